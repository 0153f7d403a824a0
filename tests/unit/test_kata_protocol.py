"""The Kata agent's protocol as published: every method, field, number and type of it that is spoken here.

Written down from github.com/kata-containers/kata-containers, src/libs/protocols/protos: agent.proto,
types.proto, health.proto. A guest with that project's own agent understands nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, ServiceDescriptor

from kata_shim.protos import agent_pb2, health_pb2, oci_pb2, types_pb2
from tests.unit import kata_containers

pytestmark = pytest.mark.quick

FILES = (agent_pb2.DESCRIPTOR, oci_pb2.DESCRIPTOR, types_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR)
EMPTY = "google.protobuf.Empty"

METHODS = {
    "grpc.AgentService": {
        **kata_containers.METHODS,
        "UpdateInterface": ("grpc.UpdateInterfaceRequest", "types.Interface"),
        "UpdateRoutes": ("grpc.UpdateRoutesRequest", "grpc.Routes"),
        "ListInterfaces": ("grpc.ListInterfacesRequest", "grpc.Interfaces"),
        "ListRoutes": ("grpc.ListRoutesRequest", "grpc.Routes"),
        "AddARPNeighbors": ("grpc.AddARPNeighborsRequest", EMPTY),
        "CreateSandbox": ("grpc.CreateSandboxRequest", EMPTY),
        "DestroySandbox": ("grpc.DestroySandboxRequest", EMPTY),
        "ReseedRandomDev": ("grpc.ReseedRandomDevRequest", EMPTY),
        "GetGuestDetails": ("grpc.GuestDetailsRequest", "grpc.GuestDetailsResponse"),
        "SetGuestDateTime": ("grpc.SetGuestDateTimeRequest", EMPTY),
    },
    "grpc.Health": {
        "Check": ("grpc.CheckRequest", "grpc.HealthCheckResponse"),
        "Version": ("grpc.CheckRequest", "grpc.VersionCheckResponse"),
    },
}

FIELDS = {
    **kata_containers.FIELDS,
    "grpc.KernelModule": ["1 name string", "2 parameters string*"],
    "grpc.Storage": [
        "1 driver string",
        "2 driver_options string*",
        "3 source string",
        "4 fstype string",
        "5 options string*",
        "6 mount_point string",
    ],
    "grpc.CreateSandboxRequest": [
        "1 hostname string",
        "2 dns string*",
        "3 storages grpc.Storage*",
        "4 sandbox_pidns bool",
        "5 sandbox_id string",
        "6 guest_hook_path string",
        "7 kernel_modules grpc.KernelModule*",
    ],
    "grpc.DestroySandboxRequest": [],
    "grpc.Interfaces": ["1 Interfaces types.Interface*"],
    "grpc.Routes": ["1 Routes types.Route*"],
    "grpc.UpdateInterfaceRequest": ["1 interface types.Interface"],
    "grpc.UpdateRoutesRequest": ["1 routes grpc.Routes"],
    "grpc.ListInterfacesRequest": [],
    "grpc.ListRoutesRequest": [],
    "grpc.ARPNeighbors": ["1 ARPNeighbors types.ARPNeighbor*"],
    "grpc.AddARPNeighborsRequest": ["1 neighbors grpc.ARPNeighbors"],
    "grpc.ReseedRandomDevRequest": ["2 data bytes"],
    "grpc.AgentDetails": [
        "1 version string",
        "2 init_daemon bool",
        "3 device_handlers string*",
        "4 storage_handlers string*",
        "5 supports_seccomp bool",
    ],
    "grpc.GuestDetailsRequest": ["1 mem_block_size bool", "2 mem_hotplug_probe bool"],
    "grpc.GuestDetailsResponse": [
        "1 mem_block_size_bytes uint64",
        "2 agent_details grpc.AgentDetails",
        "3 support_mem_hotplug_probe bool",
    ],
    "grpc.SetGuestDateTimeRequest": ["1 Sec int64", "2 Usec int64"],
    "types.IPAddress": ["1 family types.IPFamily", "2 address string", "3 mask string"],
    "types.Interface": [
        "1 device string",
        "2 name string",
        "3 IPAddresses types.IPAddress*",
        "4 mtu uint64",
        "5 hwAddr string",
        "6 devicePath string",
        "7 type string",
        "8 raw_flags uint32",
    ],
    "types.Route": [
        "1 dest string",
        "2 gateway string",
        "3 device string",
        "4 source string",
        "5 scope uint32",
        "6 family types.IPFamily",
        "7 flags uint32",
    ],
    "types.ARPNeighbor": [
        "1 toIPAddress types.IPAddress",
        "2 device string",
        "3 lladdr string",
        "4 state int32",
        "5 flags int32",
    ],
    "grpc.CheckRequest": ["1 service string"],
    "grpc.HealthCheckResponse": ["1 status grpc.HealthCheckResponse.ServingStatus"],
    "grpc.VersionCheckResponse": ["1 grpc_version string", "2 agent_version string"],
}

VALUES = {
    "types.IPFamily": {"v4": 0, "v6": 1},
    "grpc.HealthCheckResponse.ServingStatus": {"UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2},
}

SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def written(field: FieldDescriptor) -> str:
    """A field as the tables above have it."""
    inner = field.message_type or field.enum_type
    kind = inner.full_name if inner else SCALARS[field.type]
    return f"{field.number} {field.name} {kind}{'*' if field.is_repeated else ''}"


def messages() -> Iterable[Descriptor]:
    return (message for file in FILES for message in file.message_types_by_name.values())


def enums() -> Iterable[EnumDescriptor]:
    yield from (enum for file in FILES for enum in file.enum_types_by_name.values())
    yield from (enum for message in messages() for enum in message.enum_types)


def services() -> Iterable[ServiceDescriptor]:
    return (service for file in FILES for service in file.services_by_name.values())


def test_methods() -> None:
    assert {
        service.full_name: {
            method.name: (method.input_type.full_name, method.output_type.full_name)
            for method in service.methods
        }
        for service in services()
    } == METHODS


def test_fields() -> None:
    found = {message.full_name: [written(field) for field in message.fields] for message in messages()}
    assert found == FIELDS


def test_enums() -> None:
    assert {enum.full_name: {value.name: value.number for value in enum.values} for enum in enums()} == VALUES
