"""The methods of each service of the agent and their message types, as the *.proto say."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kata_shim.protos import agent_pb2, guest_pb2, health_pb2

# Method name -> (request type, response type).
Methods = dict[str, tuple[type[Message], type[Message]]]

AGENT_SERVICE = "grpc.AgentService"
HEALTH_SERVICE = "grpc.Health"
GUEST_SERVICE = "kata_shim.Guest"
RELAY_PIECE = 256 * 1024  # bytes; a RelayResponse has as many or more, but for the last


def _methods(service: ServiceDescriptor) -> Methods:
    return {
        method.name: (GetMessageClass(method.input_type), GetMessageClass(method.output_type))
        for method in service.methods
    }


AGENT: Methods = _methods(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
HEALTH: Methods = _methods(health_pb2.DESCRIPTOR.services_by_name["Health"])
GUEST: Methods = _methods(guest_pb2.DESCRIPTOR.services_by_name["Guest"])

SERVICES: dict[str, Methods] = {AGENT_SERVICE: AGENT, HEALTH_SERVICE: HEALTH, GUEST_SERVICE: GUEST}
