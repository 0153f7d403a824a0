"""Which sandbox a kata-network command means, and where its input comes from."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.started import kill
from tests.support import Guest, Runtime
from tests.system.network import booted, done, nic, refused

READERS = ("add-iface", "update-iface", "del-iface", "add-route", "del-route", "update-routes")
LISTERS = ("list-ifaces", "list-routes")
LIMIT = 1024 * 1024


@pytest.fixture
def neighbour(nics: Guest) -> Iterator[str]:
    """Another id of which the shared sandbox's is the beginning; nobody runs there."""
    directory = nics.runtime.root / "sandboxes" / f"{nics.id}-2"
    directory.mkdir(mode=0o700)
    yield directory.name
    directory.rmdir()


# The id


def test_an_id_may_be_cut_short(nics: Guest) -> None:
    run = nics.runtime
    assert run("kata-network", "list-ifaces", nics.id[:4]) == done("null")
    given = run("kata-network", "add-route", nics.id[:4], "-", stdin='{"dest":"10.1.2.3","device":"lo"}')
    assert given == done('[{"dest":"10.1.2.3/32","device":"lo"}]')


def test_an_id_that_two_begin_with(nics: Guest, neighbour: str) -> None:
    """The whole id still means its own sandbox."""
    run = nics.runtime
    for short in (nics.id[:4], nics.id[:-1]):
        assert run("kata-network", "list-ifaces", short) == refused(f"multiple containers found ({short})")
    assert run("kata-network", "list-ifaces", nics.id) == done("null")
    assert neighbour.startswith(nics.id)


@pytest.mark.parametrize("unknown", ["nobody", "hared-guest", "shared-guestx", "../etc", "*"])
def test_an_id_that_nobody_has(nics: Guest, unknown: str) -> None:
    """Not even one that only ends like a real one; the file is not looked at."""
    assert nics.id == "shared-guest"
    for command in (*READERS, *LISTERS):
        file = ["/no/such/file"] if command in READERS else []
        answer = nics.runtime("kata-network", command, unknown, *file)
        assert answer == refused(f"no such container ID ({unknown})")


def test_no_id(nics: Guest) -> None:
    for command in (*READERS, *LISTERS):
        assert nics.runtime("kata-network", command) == refused("Missing container ID"), command
        answer = nics.runtime("kata-network", command, "", *(["-"] if command in READERS else []))
        assert answer == refused("Missing container ID"), command


# The input


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "stdin:1:1: expecting value"),
        ("{", "stdin:1:2: expecting property name enclosed in double quotes"),
        ('{"name":\n  nope}', "stdin:2:3: expecting value"),
        ("{} {}", "stdin:1:4: extra data"),
        ('{"name":"eth1"}\n]', "stdin:2:1: extra data"),
        ('{"name":"a","name":"b"}', "stdin: the key 'name' stands twice in one object"),
        ("NaN", "stdin:1:1: NaN is not JSON"),
        (" " * (LIMIT - 1) + "{}", f"stdin: more than {LIMIT} bytes"),
    ],
)
def test_what_is_not_one_json_value(nics: Guest, text: str, reason: str) -> None:
    for command in READERS:
        assert nics.network(command, text) == refused(reason), command


def test_exactly_a_mebibyte(nics: Guest, tmp_path: Path) -> None:
    """The most there may be, from either place."""
    text = '{"name":"eth1"}'.ljust(LIMIT)
    file = tmp_path / "long.json"
    file.write_text(text)
    note = "name: no NIC eth1 was added by kata-network; nothing was deleted"
    assert nics.network("del-iface", text) == done("null", note)
    assert nics.runtime("kata-network", "del-iface", nics.id, str(file)) == done("null", note)
    file.write_text(text + "\n")
    answer = nics.runtime("kata-network", "del-iface", nics.id, str(file))
    assert answer == refused(f"{file}: more than {LIMIT} bytes")


@pytest.mark.parametrize(("name", "why"), [("none", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read(nics: Guest, tmp_path: Path, name: str, why: str) -> None:
    for command in READERS:
        answer = nics.runtime("kata-network", command, nics.id, str(tmp_path / name))
        assert answer == refused(f"kata-runtime: {tmp_path / name}: {why}"), command


def test_bytes_that_are_no_text(nics: Guest) -> None:
    answer = nics.runtime("kata-network", "add-iface", nics.id, "-", stdin=b'{"name":"\xff"}')
    assert answer == refused("stdin:1:10: byte 0xff is not UTF-8")


# A sandbox that has died


def test_a_dead_sandbox(runtime: Runtime, tmp_path: Path) -> None:
    """Its QEMU is gone, NIC, tap and all: every command says why, and prints null."""
    with booted(runtime, tmp_path, "dead", default_root_ports=2) as guest:
        assert guest.network("add-iface", nic(1)).status == 0
        kill(guest.record()["pid"], signal.SIGKILL)
        given: dict[str, object] = {
            "list-ifaces": None,
            "list-routes": None,
            "del-iface": {"name": "eth1"},
            "update-routes": [],
        }
        route = {"dest": "10.0.0.0/8", "device": "lo"}
        for command in (*READERS, *LISTERS):
            value = given.get(command, nic(1) if command.endswith("iface") else route)
            answer = guest.network(command, value)
            assert (answer.status, answer.stdout) == (1, "null\n"), command
            assert answer.stderr == "sandbox dead is stopped: QEMU was ended by signal 9\n", command
