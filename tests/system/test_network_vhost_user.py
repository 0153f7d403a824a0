"""vhostUserSocket: NICs whose packets go through DPDK's testpmd to a tap of the host, and back."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kata_shim.contract.interface import parse_interface
from tests.live import live
from tests.started import PATIENCE, taken, write_config
from tests.support import Guest, Runtime
from tests.system.network import (
    address,
    addresses,
    agree,
    booted,
    channels,
    cleared,
    done,
    held_files,
    link,
    nic,
    refused,
)
from tests.system.testpmd import GUEST, HOST, switch

LONGEST_PATH = 128  # bytes, as documented; a socket's own address has 107


@pytest.fixture(scope="module")
def pair(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A sandbox with two CPUs, so that two queues are used."""
    directory = tmp_path_factory.mktemp("vhost")
    with booted(runtime, directory, "vhost", default_vcpus=2, shared_memory=True) as guest:
        yield guest


@pytest.fixture
def guest(pair: Guest) -> Iterator[Guest]:
    """It; in the end without NICs, and QEMU without what they had open."""
    files = held_files(pair)
    yield pair
    try:
        agree(pair)
    finally:
        cleared(pair)
    assert held_files(pair) == files


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where sockets go: pytest's own directories have names too long for the short one."""
    with tempfile.TemporaryDirectory(prefix="vhost.", dir="/run") as path:
        yield Path(path)


def described(path: Path, **fields: object) -> dict[str, object]:
    """A NIC on the back end at `path`; `device` names no tap."""
    return nic(1, device="port1", vhostUserSocket=str(path), IPAddresses=address(GUEST, 24), **fields)


def answered(path: Path, queues: str = "") -> str:
    """What add-iface prints of it."""
    return (
        f'{{"device":"port1","name":"eth1","IPAddresses":[{{"Family":2,"Address":"{GUEST}","Mask":"24"}}],'
        f'"mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00","vhostUserSocket":"{path}"{queues}}}'
    )


def ping(guest: Guest) -> None:
    """Ping the host's end from the guest; the link may flip for two seconds while the switch sets up."""
    started = time.monotonic()
    command = ("ping", "-c", "3", "-i", "0.2", "-s", "1400", HOST)
    while " 0% packet loss" not in (told := guest.run(*command)).stdout:
        assert taken(started) < PATIENCE, told


@pytest.mark.parametrize(("queues", "shown"), [(None, ""), (1, ',"queues":1'), (2, ',"queues":2')])
def test_packets_go_through(guest: Guest, directory: Path, queues: int | None, shown: str) -> None:
    path = directory / "vhost-user1"
    count = queues or 1
    with switch(path, count) as back_end:
        added = guest.network("add-iface", described(path, queues=queues))
        assert added == done(answered(path, shown))
        assert guest.network("list-ifaces") == done(
            '[{"name":"eth1","mac":"02:42:20:6f:a3:01","ip":["10.9.0.2/24"],"mtu":1500}]'
        )
        assert channels(guest, "eth1") == {"most": count, "now": count}
        assert link("port1") == {}, "no tap is made"
        ping(guest)
        back_end.until(f"set queue enable: 1 to qp idx: {2 * count - 1}")
        agree(guest)
        assert guest.network("del-iface", added.stdout) == done("null")
        back_end.until("vhost peer closed")
        assert addresses(guest) == {}
        # In the same slot, so under the same names in QEMU: nothing of the first is left there.
        assert guest.network("add-iface", added.stdout) == added
        ping(guest)
        assert guest.network("del-iface", {"name": "eth1"}) == done("null")


def test_mtu_and_address_can_be_changed(guest: Guest, directory: Path) -> None:
    path = directory / "vhost-user1"
    with switch(path):
        given = described(path)
        assert guest.network("add-iface", given).status == 0
        changed = guest.network(
            "update-iface", {**given, "mtu": 1400, "IPAddresses": address("10.9.0.3", 24)}
        )
        assert (changed.status, changed.json["mtu"]) == (0, 1400)
        agree(guest)
        assert addresses(guest)["eth1"]["mtu"] == 1400
        ping(guest)
        assert guest.network("del-iface", given) == done("null")


@pytest.mark.parametrize("length", [107, 108, LONGEST_PATH])
def test_a_path_of_any_length(guest: Guest, directory: Path, length: int) -> None:
    """The kernel's own addresses end at 107 bytes: a longer path is one that the socket was moved to."""
    short = directory / "vhost-user1"
    path = Path(f"{directory}/{'v' * (length - len(str(directory)) - 1)}")
    assert len(str(path)) == length
    with switch(short):
        short.rename(path)
        assert guest.network("add-iface", described(path)) == done(answered(path))
        ping(guest)
        assert guest.network("del-iface", {"name": "eth1"}) == done("null")
        path.rename(short)


def test_a_back_end_that_has_died(guest: Guest, directory: Path) -> None:
    """The NIC hears no more, but it can be deleted, and added anew when the back end is back."""
    path = directory / "vhost-user1"
    with switch(path):
        assert guest.network("add-iface", described(path)).status == 0
        ping(guest)
    agree(guest)
    assert guest.network("del-iface", {"name": "eth1"}) == done("null")
    with switch(path):
        assert guest.network("add-iface", described(path)).status == 0
        ping(guest)
        assert guest.network("del-iface", {"name": "eth1"}) == done("null")


# Back ends that are none


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket that takes connections, and never says a word."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def test_a_socket_where_nobody_listens(guest: Guest, directory: Path) -> None:
    path = directory / "vhost-user1"
    with listening(path):
        pass
    reason = f"vhostUserSocket: no vhost-user back end at {path}: Connection refused"
    assert guest.network("add-iface", described(path)) == refused(reason)
    assert guest.network("list-ifaces") == done("null")


def test_a_silent_back_end_does_not_stop_the_guest(guest: Guest, directory: Path) -> None:
    """QEMU would wait for its answer for ever, and the guest with it."""
    path = directory / "vhost-user1"
    with listening(path):
        reason = f"vhostUserSocket: no vhost-user back end at {path}: no answer within 2 s"
        assert guest.network("add-iface", described(path)) == refused(reason)
    assert guest.run("true").status == 0
    assert guest.network("list-ifaces") == done("null")


def test_it_shares_names_with_other_nics(guest: Guest, directory: Path) -> None:
    """`device` is a tap's name for other NICs: it is taken all the same, and tap NICs go on beside it."""
    path = directory / "vhost-user1"
    with switch(path):
        assert guest.network("add-iface", described(path)).status == 0
        taken = f"device: port1 is already used by sandbox {guest.id}; it must be unique on the host"
        assert guest.network("add-iface", nic(2, device="port1")) == refused(taken)
        assert guest.network("add-iface", nic(2)).json["pciAddr"] == "01.1/00"
        agree(guest)
        ping(guest)
        cleared(guest)


async def test_nothing_is_left_in_qemu(root: Path, directory: Path) -> None:
    """By QEMU's own account: device, netdev, character device and descriptors, here and there."""
    path = directory / "configuration.toml"
    config = write_config(path, accelerator="tcg", default_root_ports=2, shared_memory=True)
    (root / "sandboxes" / "inside").mkdir(mode=0o700, parents=True)
    path = directory / "vhost-user1"
    given, _ = parse_interface(described(path, queues=2))
    async with live(root, "inside", config) as sandbox:
        with switch(path, 2):
            await sandbox.network.add(given)  # what is opened once, by the first, stays open
            assert await sandbox.network.delete(given.name)
            before = await sandbox.world()
            await sandbox.network.add(given)
            there = await sandbox.world()
            assert set(there["peripheral"]) - set(before["peripheral"]) == {"nic-01.0-00"}
            assert set(there["chardevs"]) - set(before["chardevs"]) == {"chr-nic-01.0-00"}
            assert await sandbox.network.delete(given.name)
            assert await sandbox.world() == before
