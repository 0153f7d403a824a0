"""What the guest must have at hand: its modules, its tools, and `lo` up from the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import Guest

PROJECT = Path(__file__).resolve().parents[2]

# Each ends well only where the tool is there and the kernel has what it needs.
TOOLS = {
    "ipvsadm -Ln": "IP Virtual Server version",
    "conntrack -L": "",
    "ip -j link": '"lo"',
    "tc -j qdisc": '"noqueue"',
    "busybox true": "",
    "python3 -c 'import sys; print(sys.version)'": "3.11",
}


def modules() -> list[str]:
    """The modules that the image is to hold, `boot` or not."""
    (listed,) = (PROJECT / "scripts").rglob("modules.txt")
    lines = (line.partition("#")[0].split() for line in listed.read_text().splitlines())
    return [words[-1] for words in lines if words]


def test_every_module_is_there(shared_guest: Guest) -> None:
    """With all that it depends on, as the kernel's own modprobe would load it."""
    script = 'for name; do modprobe -D "$name" >/dev/null || echo "$name"; done'
    done = shared_guest.run("sh", "-c", script, "sh", *modules())
    assert (done.status, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", TOOLS)
def test_every_tool_works(shared_guest: Guest, command: str) -> None:
    done = shared_guest.run("sh", "-c", command)
    assert done.status == 0, done
    assert TOOLS[command] in done.stdout


def test_lo_is_up_from_the_start(shared_guest: Guest) -> None:
    """IPVS takes no destination, and nothing can talk to itself, without it."""
    (lo,) = shared_guest.run("ip", "-j", "addr", "show", "lo").json
    assert {"UP", "LOWER_UP"} <= set(lo["flags"])
    assert {each["local"] for each in lo["addr_info"]} == {"127.0.0.1", "::1"}
