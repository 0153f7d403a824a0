"""A sandbox's taps are in the network namespace that it was started in, wherever its later callers are."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.started import kill, shims, write_config
from tests.support import Guest, Result, Runtime
from tests.system.network import done, ip, link, listed, nic

EMULATED = "as configured: QEMU emulates (TCG), which is slow\n"
TAP_MTU = 1450  # before a NIC has it


@dataclass(frozen=True)
class Inside(Runtime):
    """`kata-runtime` called from within a network namespace."""

    namespace: str

    def command(self, *arguments: str) -> list[str]:
        """The command line of a call."""
        return ["ip", "netns", "exec", self.namespace, *super().command(*arguments)]

    def link(self, device: str) -> dict[str, Any]:
        """The namespace's device as `ip -j link` shows it, {} where there is none."""
        command = ["ip", "-n", self.namespace, "-j", "link", "show", device]
        shown = subprocess.run(command, capture_output=True, check=False)
        return dict(json.loads(shown.stdout)[0]) if shown.returncode == 0 else {}


@contextmanager
def namespace(runtime: Runtime, name: str) -> Iterator[Inside]:
    """Make a network namespace; whoever is in it keeps it beyond the end."""
    ip("netns", "add", name)
    try:
        yield Inside(runtime.root, runtime.config, name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """The tests' own names of namespaces, whatever names the host has."""
    directory = Path("/run/netns")
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "kata-shim-test", directory], check=True)
    yield
    subprocess.run(["umount", "/run/netns"], check=True)


@pytest.fixture
def decoy() -> Iterator[str]:
    """A tap of the callers' namespace, down, of the same name as the one the sandbox has in its own."""
    ip("tuntap", "add", "tap1", "mode", "tap")
    ip("link", "set", "tap1", "mtu", str(TAP_MTU))
    yield "tap1"
    ip("link", "delete", "tap1")


@pytest.fixture
def guest(runtime: Runtime, tmp_path: Path, inner: Inside) -> Iterator[Guest]:
    """A sandbox that was started in a namespace; it is called from the tests' own."""
    config = write_config(tmp_path / "configuration.toml", accelerator="tcg")
    assert inner("run", "--detach", "--config", str(config), "elsewhere") == Result(0, "", EMULATED)
    yield Guest(runtime, "elsewhere")
    assert runtime("delete", "--force", "elsewhere") == Result(0, "", "")


@pytest.fixture
def inner(runtime: Runtime, names: None) -> Iterator[Inside]:
    """The namespace that the sandbox is started in, with a tap like the decoy."""
    with namespace(runtime, "kata-inner") as inner:
        ip("-n", inner.namespace, "tuntap", "add", "tap1", "mode", "tap")
        yield inner


def test_taps_are_where_the_sandbox_is(guest: Guest, inner: Inside, decoy: str) -> None:
    """Its shim, killed, is started anew by a call from another namespace, and works in the sandbox's."""
    untouched = link(decoy)
    at_home = Guest(inner, guest.id)
    assert at_home.network("add-iface", nic(1, mtu=1400)).status == 0
    assert inner.link(decoy)["mtu"] == 1400
    assert at_home.network("del-iface", {"name": "eth1"}) == done("null")

    _kill_shim(guest)
    added = guest.network("add-iface", nic(1, mtu=1300))
    assert added.status == 0, added
    assert inner.link(decoy)["mtu"] == 1300
    assert "UP" in inner.link(decoy)["flags"]
    assert link(decoy) == untouched
    # One that is made is made there too.
    assert guest.network("add-iface", nic(2)).status == 0
    assert "UP" in inner.link("tap2")["flags"]
    assert link("tap2") == {}
    assert [one["name"] for one in listed(at_home)] == ["eth1", "eth2"]


def test_a_namespace_that_has_lost_its_name(guest: Guest, runtime: Runtime, decoy: str) -> None:
    """It is QEMU's alone then; and the caller is in a third."""
    untouched = link(decoy)
    ip("netns", "delete", "kata-inner")
    _kill_shim(guest)
    with namespace(runtime, "kata-third") as third:
        beyond = Guest(third, guest.id)
        assert beyond.network("add-iface", nic(1)).status == 0
        assert beyond.network("add-iface", nic(2)).status == 0
        assert third.link("tap1") == third.link("tap2") == {}
    assert link(decoy) == untouched
    assert _flags_at_home(guest, "tap1") >= {"UP", "LOWER_UP"}
    assert _flags_at_home(guest, "tap2") >= {"UP", "LOWER_UP"}
    for name in ("eth1", "eth2"):
        assert guest.network("del-iface", {"name": name}) == done("null")


def _kill_shim(guest: Guest) -> None:
    (shim,) = shims(guest.runtime.root, guest.id)
    kill(shim)


def _flags_at_home(guest: Guest, device: str) -> set[str]:
    """The flags of a device in the network namespace of the sandbox's QEMU."""
    enter = ["nsenter", f"--net=/proc/{guest.record()['pid']}/ns/net"]
    shown = subprocess.run([*enter, "ip", "-j", "link", "show", device], capture_output=True, check=True)
    return set(json.loads(shown.stdout)[0]["flags"])
