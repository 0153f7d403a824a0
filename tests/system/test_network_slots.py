"""pciAddr: 25 slots on either machine type, numbered as documented, each usable, and no more than those."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import Guest, Runtime
from tests.system.network import agree, booted, compact, link, nic, refused

SLOTS = 25


def fill(guest: Guest) -> list[str]:
    """Add NICs one after another until every slot is taken, and return where they are."""
    return [guest.network("add-iface", nic(number)).json["pciAddr"] for number in range(1, SLOTS + 1)]


def test_q35(nics: Guest) -> None:
    """Eight root ports to a slot: the ninth is 02.0/00."""
    assert fill(nics) == [f"{1 + index // 8:02x}.{index % 8}/00" for index in range(SLOTS)]
    assert nics.network("add-iface", nic(SLOTS + 1)) == refused(
        "no free PCI slot: all 25 of this q35 sandbox are taken; remove a device,"
        " or raise default_root_ports (now 25, at most 25) for the next sandbox"
    )
    assert link(f"tap{SLOTS + 1}") == {}


def test_pc(runtime: Runtime, tmp_path: Path) -> None:
    """Behind the bridge in slot 2, from 01 on, in hex."""
    with booted(runtime, tmp_path, "pc", machine_type="pc") as guest:
        assert fill(guest) == [f"02.0/{index:02x}" for index in range(1, SLOTS + 1)]
        assert guest.network("add-iface", nic(SLOTS + 1)) == refused(
            "no free PCI slot: all 25 of this pc sandbox are taken; remove a device,"
            " or raise default_bridges (now 1, at most 5) for the next sandbox"
        )
        agree(guest)
        assert guest.network("del-iface", nic(9)).stdout == "null\n"
        assert guest.network("add-iface", nic(9)).json["pciAddr"] == "02.0/09"


def test_pc_on_a_second_bridge(runtime: Runtime, tmp_path: Path) -> None:
    """All at once: which NIC gets which slot is left to chance, which slots are taken is not."""
    with booted(runtime, tmp_path, "bridges", machine_type="pc", default_bridges=2) as guest:
        running = []
        for number in range(1, SLOTS + 2):
            file = tmp_path / f"{number}.json"
            file.write_text(json.dumps(nic(number)))
            running.append(runtime.start("kata-network", "add-iface", guest.id, str(file)))
        slots = []
        for process in running:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, b"")
            added = json.loads(out)
            assert out.decode() == compact(added)
            slots.append(added["pciAddr"])
        assert sorted(slots) == [*(f"02.0/{index:02x}" for index in range(1, SLOTS + 1)), "03.0/01"]
        agree(guest)
