"""Devices' two renderings, and what stands on QEMU's command line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from kata_shim.qemu import devices
from kata_shim.qemu.cmdline import MachineSpec, build, kernel_command_line
from kata_shim.qemu.topology import Topology

pytestmark = pytest.mark.quick

SPEC = MachineSpec(
    name="box",
    uuid="7d0a0b3c-3b5e-4c8e-9a53-3d9bd8f3a6b1",
    path="/usr/bin/qemu-system-x86_64",
    topology=Topology("q35", 2, 0),
    accelerator="tcg",
    kernel="/guest/vmlinux",
    initrd="/guest/initrd",
    default_vcpus=2,
    default_memory=512,
    qmp_fd=5,
    console_fd=6,
    agent_fd=7,
)


def option(argv: list[str], flag: str, start: str = "") -> str:
    """Return the one value of `flag` that begins with `start`."""
    values = [value for key, value in pairwise(argv) if key == flag and value.startswith(start)]
    assert len(values) == 1, (flag, start, values)
    return values[0]


def test_a_device_is_rendered_for_argv_and_for_qmp() -> None:
    card = devices.virtio_net("nic", "net", "02:00:00:00:00:01", "port0", "0", queues=4)
    assert card.argv == [
        "-device",
        "virtio-net-pci,id=nic,netdev=net,mac=02:00:00:00:00:01,bus=port0,addr=0,romfile=,mq=on,vectors=10",
    ]
    assert card.arguments["vectors"] == 10
    assert card.arguments["mq"] is True


def test_vhost_user_without_msix_has_no_vectors_but_its_queues() -> None:
    card = devices.virtio_net("nic", "net", "02:00:00:00:00:01", "port0", "0", queues=2, msix=False)
    assert (card.arguments["mq"], card.arguments["vectors"]) == (True, 0)
    assert "vectors" not in devices.virtio_net("n", "d", "02:00:00:00:00:01", "b", "0").arguments


def test_commas_in_values_are_doubled() -> None:
    assert devices.Netdev("user", "n", {"tftp": "/a,b"}).argv == ["-netdev", "user,id=n,tftp=/a,,b"]
    argv = build(replace(SPEC, name="a,b", entropy_source="/dev/x,y"))
    assert option(argv, "-name") == "a,,b,debug-threads=on"
    assert option(argv, "-object", "rng").endswith("filename=/dev/x,,y")


def test_taps_are_named_in_order_and_vhost_only_where_given() -> None:
    assert devices.tap_netdev("n", ["a", "b"], []).arguments == {"type": "tap", "id": "n", "fds": "a:b"}
    assert devices.tap_netdev("n", ["a"], ["v"]).argv == ["-netdev", "tap,id=n,fds=a,vhost=on,vhostfds=v"]


def test_the_command_line_of_a_plain_sandbox() -> None:
    argv = build(SPEC)
    assert argv[0] == SPEC.path
    for flag in ("-nodefaults", "-no-user-config", "-no-reboot"):
        assert flag in argv
    assert option(argv, "-machine") == "q35,memory-backend=mem"
    assert option(argv, "-object", "memory") == "memory-backend-memfd,id=mem,size=512M,share=on"
    assert (option(argv, "-smp"), option(argv, "-m")) == ("2", "512M")
    assert (option(argv, "-kernel"), option(argv, "-initrd")) == ("/guest/vmlinux", "/guest/initrd")
    assert option(argv, "-sandbox").startswith("on,")
    assert option(argv, "-chardev", "socket,id=qmp") == "socket,id=qmp,fd=5,server=on,wait=off"
    assert option(argv, "-device", "virtserialport").endswith("name=agent.channel.0")
    assert option(argv, "-device", "vmgenid") == "vmgenid,id=generation,guid=auto"
    assert [value for value in argv if value.startswith("pcie-root-port")] == [
        "pcie-root-port,id=port0,bus=pcie.0,addr=1.0,chassis=1,slot=0,multifunction=on",
        "pcie-root-port,id=port1,bus=pcie.0,addr=1.1,chassis=1,slot=1,multifunction=on",
    ]
    assert "-d" not in argv
    assert "-bios" not in argv


def test_private_memory_has_no_backend() -> None:
    argv = build(replace(SPEC, shared_memory=False))
    assert "memory-backend" not in " ".join(argv)


def test_vsock_takes_the_place_of_virtio_serial() -> None:
    argv = build(replace(SPEC, agent_fd=-1, guest_cid=42))
    assert option(argv, "-device", "vhost-vsock-pci").endswith("guest-cid=42")
    assert not [value for value in argv if "virtserialport" in value]


@pytest.mark.parametrize(
    ("accelerator", "default_vcpus", "max_vcpus", "expected"),
    [
        ("tcg", 1, 1, "tcg"),
        ("tcg", 2, 2, "tcg,thread=single"),
        ("tcg", 1, 3, "tcg,thread=single"),
        ("tcg", 2, 0, "tcg,thread=single"),
        ("kvm", 2, 3, "kvm"),
    ],
)
def test_emulated_cpus_share_a_thread(
    accelerator: str, default_vcpus: int, max_vcpus: int, expected: str
) -> None:
    spec = replace(SPEC, accelerator=accelerator, default_vcpus=default_vcpus, max_vcpus=max_vcpus)
    assert option(build(spec), "-accel") == expected


def test_machine_accelerators_are_trimmed_and_appended() -> None:
    argv = build(replace(SPEC, machine_accelerators=",, abc ,,, 123 ,,"))
    assert option(argv, "-machine").endswith(",abc,123")


def test_firmware_cpu_model_and_debug() -> None:
    argv = build(replace(SPEC, firmware="/fw.bin", cpu_model="Nehalem", enable_debug=True))
    assert (option(argv, "-bios"), option(argv, "-cpu")) == ("/fw.bin", "Nehalem")
    assert "-d" not in argv, "a guest could fill qemu.log with what that tells"
    assert option(build(replace(SPEC, accelerator="kvm")), "-cpu") == "host"


def test_the_users_kernel_parameters_come_last() -> None:
    words = kernel_command_line(" panic=0  agent.log=debug ", enable_debug=False).split()
    assert words[-2:] == ["panic=0", "agent.log=debug"]
    assert "quiet" in words
    assert "quiet" not in kernel_command_line("", enable_debug=True).split()


def test_only_clones_that_are_emulated_do_without_huge_pages() -> None:
    assert SPEC.huge_pages
    assert not replace(SPEC, incoming=True).huge_pages
    assert replace(SPEC, incoming=True, accelerator="kvm").huge_pages


@pytest.mark.parametrize(("accelerator", "vectors"), [("tcg", ",vectors=0"), ("kvm", "")])
def test_virtio_fs_takes_the_place_of_9p(accelerator: str, vectors: str) -> None:
    argv = build(replace(SPEC, accelerator=accelerator, virtio_fs=True, files_fd=8))
    assert option(argv, "-chardev", "socket,id=shared") == "socket,id=shared,fd=8"
    device = option(argv, "-device", "vhost-user-fs-pci")
    assert device.endswith(f",chardev=shared,tag=kataShared,queue-size=1024{vectors}")
    assert "9p" not in " ".join(argv)
