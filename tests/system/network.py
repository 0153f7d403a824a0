"""The kata-network tests' hands: sandboxes, taps, and whether guest, host and record tell the same."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.started import write_config
from tests.support import Guest, Result, Runtime

# ETHTOOL_GCHANNELS of the kernel's ethtool.h: the most and the current number of rx, tx, other and combined.
CHANNELS = """
import array, fcntl, json, socket, struct, sys
channels = array.array("I", [0x3C] + [0] * 8)
request = struct.pack("16sP16x", sys.argv[1].encode(), channels.buffer_info()[0])
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8946, request)
print(json.dumps({"most": channels[4], "now": channels[8]}))
"""


@contextmanager
def booted(runtime: Runtime, directory: Path, sandbox_id: str, **fields: str | int | bool) -> Iterator[Guest]:
    """Run a sandbox with these fields of [hypervisor.qemu], a clone of what another test booted if it can be.

    Emulated: its trial of KVM is another test's.
    """
    template = None if "path" in fields else runtime.root / "template"
    config = write_config(directory / f"{sandbox_id}.toml", template, accelerator="tcg", **fields)
    started = runtime("run", "--detach", "--config", str(config), sandbox_id)
    assert (started.status, started.stdout) == (0, ""), started
    try:
        yield Guest(runtime, sandbox_id)
    finally:
        assert runtime("delete", "--force", sandbox_id) == Result(0, "", "")


def nic(number: int, **fields: object) -> dict[str, Any]:
    """Describe a NIC that shares nothing with those of other numbers; a field given as None is left out."""
    described = {
        "device": f"tap{number}",
        "name": f"eth{number}",
        "mtu": 1500,
        "hwAddr": f"02:42:20:6f:a3:{number:02x}",
        **fields,
    }
    return {key: value for key, value in described.items() if value is not None}


def address(ip: str, mask: str | int) -> list[dict[str, object]]:
    """The input's IPAddresses."""
    return [{"address": ip, "mask": mask}]


def compact(value: object) -> str:
    """What stdout is: compact JSON and one newline."""
    return json.dumps(value, separators=(",", ":")) + "\n"


def done(text: str, *notes: str) -> Result:
    """A success that prints this text, and nothing on stderr but these lines."""
    return Result(0, text + "\n", "".join(f"{note}\n" for note in notes))


def refused(reason: str, stdout: str = "null") -> Result:
    """A failure with this one line on stderr."""
    return Result(1, stdout + "\n", reason + "\n")


def ip(*words: str) -> None:
    """Run `ip` on the host, that is in the tests' network namespace."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def tap(device: str, *options: str) -> Iterator[None]:
    """Make a tap that exists before any sandbox sees it."""
    ip("tuntap", "add", device, "mode", "tap", *options)
    try:
        yield
    finally:
        ip("link", "delete", device)


def link(device: str) -> dict[str, Any]:
    """The host's device as `ip -j link` shows it, {} where there is none."""
    shown = subprocess.run(["ip", "-d", "-j", "link", "show", device], capture_output=True, check=False)
    return dict(json.loads(shown.stdout)[0]) if shown.returncode == 0 else {}


def addresses(guest: Guest) -> dict[str, dict[str, Any]]:
    """The guest's links but `lo`, as `ip -j addr` shows them."""
    shown = guest.run("ip", "-j", "addr").json
    return {one["ifname"]: one for one in shown if one["ifname"] != "lo"}


def listed(guest: Guest) -> list[dict[str, Any]]:
    """What list-ifaces prints."""
    answer = guest.network("list-ifaces")
    assert (answer.status, answer.stderr) == (0, ""), answer
    assert answer.stdout == compact(answer.json)
    return answer.json or []


def channels(guest: Guest, name: str) -> dict[str, int]:
    """The most and the current combined channels of the guest's NIC."""
    return dict(json.loads(guest.run("python3", "-c", CHANNELS, name).stdout))


def held_files(guest: Guest) -> int:
    """How many descriptors the sandbox's QEMU has open."""
    return len(os.listdir(f"/proc/{guest.record()['pid']}/fd"))


def agree(guest: Guest) -> None:
    """Compare list-ifaces with the guest's own links, the host's devices and the record."""
    told = listed(guest)
    there = addresses(guest)
    assert sorted(one["name"] for one in told) == sorted(there)
    for one in told:
        found = there[one["name"]]
        assert (found["address"], found["mtu"]) == (one["mac"], one["mtu"])
        assert "UP" in found["flags"]
        given = [f"{a['local']}/{a['prefixlen']}" for a in found["addr_info"] if a["scope"] != "link"]
        assert given == one["ip"]
    record = guest.record()["nics"]
    interfaces = [each["interface"] for each in record]
    assert [each["name"] for each in interfaces] == [one["name"] for one in told]
    assert all(each["phase"] == "present" for each in record)
    claims = guest.runtime.root / "devices"
    mine = (
        [each.name for each in claims.iterdir() if os.readlink(each) == guest.id] if claims.exists() else []
    )
    assert sorted(mine) == sorted(each["device"] for each in interfaces)
    for each in interfaces:
        host = link(each["device"])
        if "vhostUserSocket" in each:
            assert not host
        else:
            assert host["mtu"] == each["mtu"]
            assert "UP" in host["flags"]


def cleared(guest: Guest) -> None:
    """Take every NIC and route away, and see the guest without them."""
    for one in listed(guest):
        assert guest.network("del-iface", {"name": one["name"]}) == done("null")
    assert guest.network("update-routes", []) == done("[]")
    agree(guest)
