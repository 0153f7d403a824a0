"""Sandboxes whose shims a zygote forks live as all others do, and longer than the zygote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.started import kill, shims
from tests.support import Guest, Runtime
from tests.system.network import address, agree, booted, done, listed, nic
from tests.zygote import Zygote, parent, request, zygote


@pytest.fixture
def one(runtime: Runtime) -> Iterator[Zygote]:
    """A zygote that forks the shims of the tests' root."""
    with zygote(runtime.root) as one:
        with one.dial() as connection:  # a start waits a second for it and no longer: it has to be there
            connection.sendall(request(runtime.root, "nobody", version="0"))
            assert connection.recv(1) == b"-"
        yield one


def shim_of(guest: Guest) -> int:
    (pid,) = shims(guest.runtime.root, guest.id)
    return pid


def test_sandbox_by_a_zygote(one: Zygote, runtime: Runtime, tmp_path: Path) -> None:
    """It starts, loses its shim, gets another, loses the zygote, and its shim again."""
    with booted(runtime, tmp_path, "forked") as guest:
        assert parent(shim_of(guest)) == one.pid
        assert guest.network("add-iface", nic(1, IPAddresses=address("10.0.1.1", 24))).status == 0
        assert guest.run("cat", stdin=b"hello").stdout == "hello"

        kill(shim_of(guest))
        agree(guest)
        assert parent(shim_of(guest)) == one.pid

        last = shim_of(guest)
        one.kill()
        agree(guest)
        assert shim_of(guest) == last
        assert guest.network("del-iface", {"name": "eth1"}) == done("null")

        kill(last)
        assert guest.network("add-iface", nic(2)).status == 0
        assert parent(shim_of(guest)) != one.pid
        assert [one["name"] for one in listed(guest)] == ["eth2"]
        assert guest.run("true").status == 0


def test_what_a_shim_imports_it_has_already(one: Zygote, runtime: Runtime, tmp_path: Path) -> None:
    """Else each would have its own copy of it in memory, and read it from disk."""
    with booted(runtime, tmp_path, "forked") as guest:
        assert guest.network("add-iface", nic(1)).status == 0
        assert guest.run("true").status == 0
        maps = Path(f"/proc/{shim_of(guest)}/maps").read_text()
    libraries = {line.split(maxsplit=5)[5] for line in maps.splitlines() if ".so" in line}
    theirs = Path(f"/proc/{one.pid}/maps").read_text()
    assert {library for library in libraries if library not in theirs} == set()
