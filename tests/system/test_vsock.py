"""use_vsock = true, for real: on a host with vhost_vsock, which is a guest of this one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_shim.vm.spec import guest_cid
from tests.started import write_config
from tests.support import Guest, Result, Runtime
from tests.system.nested import Nested, host
from tests.system.network import address, done, listed, nic

BOOT_TIMEOUT = 400  # seconds
TRIES = 3
ENDPOINT = "/run/nested-cache/cache.sock"
NIC = nic(1, IPAddresses=address("172.16.0.3", "16"))
LISTED = [{"name": "eth1", "mac": NIC["hwAddr"], "ip": ["172.16.0.3/16"], "mtu": 1500}]

LEFT = """
ls -A /run/nested/sandboxes /run/nested/devices /sys/class/net
cat /proc/[0-9]*/cmdline 2>/dev/null | grep -ao [q]emu-system
"""
CALL = """
import socket, sys
with socket.socket(socket.AF_VSOCK) as call:
    call.settimeout(30)
    call.connect((int(sys.argv[1]), 1024))
    try:
        print(call.recv(1))
    except ConnectionResetError:
        print(b"")
"""

# IOCTL_VM_SOCKETS_GET_LOCAL_CID of the kernel's vm_sockets.h.
CONTEXT_ID = """
import fcntl, struct
print(struct.unpack("I", fcntl.ioctl(open("/dev/vsock"), 0x7B9, bytes(4)))[0])
"""

# Until a VM is ready.
WATCH = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as watch:
    watch.connect(sys.argv[1])
    watch.sendall(b'{"id":1,"method":"factory.watch"}\\n')
    lines = watch.makefile()
    while not json.loads(lines.readline())["progress"]["ready"]:
        pass
"""


@pytest.fixture(scope="module")
def nested(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nested]:
    """A host that does not have vhost_vsock yet."""
    directory = tmp_path_factory.mktemp("nested")
    config = write_config(
        directory / "vsock.toml",
        Path("/run/template"),
        use_vsock=True,
        accelerator="kvm",
        default_memory=300,
        default_root_ports=2,
        agent_timeout=BOOT_TIMEOUT // 3,  # so that what does not come up says why
        hotplug_timeout=60,
    )
    with config.open("a") as file:  # which no sandbox sees until a factory runs
        file.write(f'vm_cache_number = 1\nvm_cache_endpoint = "{ENDPOINT}"\n')
    with host(runtime, directory, config) as made:
        yield made


@pytest.fixture(scope="module")
def guest(nested: Nested) -> Iterator[Guest]:
    """A sandbox whose agent is reached by vsock."""
    assert nested.outer.run("modprobe", "vhost_vsock") == Result(0, "", "")
    assert nested("run", "--detach", "sb", timeout=BOOT_TIMEOUT) == Result(0, "", "")
    yield Guest(nested, "sb")
    assert nested("delete", "--force", "sb") == Result(0, "", "")
    left = nested.shell(LEFT)
    assert left == Result(1, "/run/nested/devices:\n\n/run/nested/sandboxes:\n\n/sys/class/net:\nlo\n", "")


def test_refused_without_vhost_vsock(nested: Nested) -> None:
    """The first test: the fixture `guest` loads the module."""
    message = "/dev/vhost-vsock does not exist: load the module vhost_vsock, or set it to false"
    assert nested("run", "--detach", "sb") == Result(
        1, "", f"{nested.config}:2: [hypervisor.qemu] use_vsock: true; {message}\n"
    )


def test_a_clone_has_a_context_id_of_its_own(nested: Nested, guest: Guest) -> None:
    """The template had another; what follows is all said by a clone."""
    assert nested("state", "sb").json["source"] == "template"
    uuid = json.loads(nested.shell("cat /run/nested/sandboxes/sb/record.json").stdout)["uuid"]
    assert guest.run("python3", "-c", CONTEXT_ID) == Result(0, f"{guest_cid(uuid)}\n", "")


def test_vsock_is_the_channel(nested: Nested, guest: Guest) -> None:
    """The guest has no virtio-serial port, and QEMU no capability but those for files."""
    assert guest.run("ls", "-A", "/sys/class/virtio-ports") == Result(0, "", "")
    pid = str(nested("state", "sb").json["pid"])
    capabilities = nested.shell('grep CapEff "/proc/$1/status"; readlink /proc/$1/fd/* | grep vsock', pid)
    assert capabilities == Result(0, "CapEff:\t000000008000001b\n/dev/vhost-vsock\n", "")


def test_network(guest: Guest) -> None:
    assert guest.network("list-ifaces") == done("null")
    added = guest.network("add-iface", NIC)
    assert (added.status, added.stderr) == (0, "")
    assert added.json["pciAddr"] == "01.0/00"
    assert listed(guest) == LISTED
    assert "inet 172.16.0.3/16 brd 172.16.255.255 scope global eth1" in guest.run("ip", "addr").stdout


def test_bytes_both_ways(guest: Guest) -> None:
    """More than what vsock takes before the other side has read."""
    data = os.urandom(1 << 19).hex()
    assert guest.run("cat", stdin=data.encode()) == Result(0, data, "")


def test_only_the_host_is_heard(guest: Guest) -> None:
    """A process in the guest can connect to the agent as well, but is not served."""
    assert guest.run("modprobe", "vsock_loopback") == Result(0, "", "")
    assert guest.run("python3", "-c", CALL, "1") == Result(0, "b''\n", "")


def test_only_root_of_the_host_is_heard(nested: Nested, guest: Guest) -> None:
    """Another user of the host can connect to the guest's port, but is not served."""
    assert guest.run("true") == Result(0, "", "")
    uuid = json.loads(nested.shell("cat /run/nested/sandboxes/sb/record.json").stdout)["uuid"]
    call = 'exec setpriv --reuid 65534 --clear-groups /usr/bin/python3 -c "$1" "$2"'
    assert nested.shell(call, CALL, str(guest_cid(uuid))) == Result(0, "b''\n", "")


def test_shim_killed(nested: Nested, guest: Guest) -> None:
    before = nested("state", "sb").json
    assert nested.kill(before["shimPid"]) == Result(0, "", "")
    assert listed(guest) == LISTED
    after = nested("state", "sb").json
    assert after["shimPid"] != before["shimPid"]
    assert {**after, "shimPid": 0} == {**before, "shimPid": 0}
    assert guest.network("del-iface", {"name": "eth1"}) == done("null")
    assert "eth1" not in guest.run("ip", "link").stdout


def test_qemu_killed(nested: Nested, guest: Guest) -> None:
    """Who waits hears why, and delete clears what is left."""
    with nested.start("exec", "sb", "--", "sh", "-c", "echo up; exec sleep 1000") as call:
        assert call.stdout is not None
        assert call.stdout.readline() == b"up\n"
        assert nested.kill(nested("state", "sb").json["pid"]) == Result(0, "", "")
        assert call.communicate(timeout=60) == (b"", b"QEMU has ended\n")
    assert call.returncode == 1
    stopped = nested("state", "sb").json
    assert (stopped["status"], stopped["pid"], stopped["cause"]) == ("stopped", 0, "QEMU has ended")


def _run_kept(nested: Nested) -> tuple[str, str]:
    """Start a sandbox once the factory has a VM ready; return its source, and its shim's log."""
    watching = ("chroot", "/host", "python3", "-c", WATCH, ENDPOINT)
    outer = nested.outer
    ready = outer.runtime("exec", outer.id, "--", *watching, timeout=BOOT_TIMEOUT)
    assert ready == Result(0, "", "")
    assert nested("run", "--detach", "kept", timeout=BOOT_TIMEOUT).status == 0
    why = nested.shell("cat /run/nested/sandboxes/kept/shim.log").stdout
    return str(nested("state", "kept").json["source"]), why


def test_a_sandbox_from_the_cache(nested: Nested, guest: Guest) -> None:
    """It keeps the context id that the factory gave to its VM, after whose uuid it goes."""
    with nested.start("factory", "init") as factory:
        assert factory.stderr is not None
        assert b"the factory serves" in factory.stderr.readline()
        tries = [_run_kept(nested)]
        # Nested, the factory does not always answer in the time that a start waits for it.
        while tries[-1][0] != "cache" and len(tries) < TRIES:
            assert nested("delete", "--force", "kept") == Result(0, "", "")
            tries.append(_run_kept(nested))
        assert tries[-1][0] == "cache", tries
        uuid = json.loads(nested.shell("cat /run/nested/sandboxes/kept/record.json").stdout)["uuid"]
        kept = Guest(nested, "kept")
        assert kept.run("python3", "-c", CONTEXT_ID) == Result(0, f"{guest_cid(uuid)}\n", "")
        assert nested("factory", "destroy") == Result(0, "", "")
        factory.communicate(timeout=60)
        assert kept.run("hostname") == Result(0, "kept\n", "")
        assert nested("delete", "--force", "kept") == Result(0, "", "")
    assert factory.returncode == 0
