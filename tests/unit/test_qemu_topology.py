"""Slots: the contract's numbering, exhaustion in words, reservation after re-attach."""

from __future__ import annotations

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu.topology import FIXED_SLOTS, Topology

pytestmark = pytest.mark.quick


def test_root_ports_stand_eight_to_a_slot() -> None:
    topology = Topology("q35", 25, 0)
    paths = [topology.allocate().path for _ in range(25)]
    assert paths[:9] == [f"01.{function}/00" for function in range(8)] + ["02.0/00"]
    assert paths[-1] == "04.0/00"
    assert topology.free_slots == 0


def test_bridges_hold_25_devices_each_from_slot_two_on() -> None:
    topology = Topology("pc", 0, 2)
    slots = [topology.allocate() for _ in range(50)]
    assert [slot.path for slot in slots[:2]] == ["02.0/01", "02.0/02"]
    assert (slots[9].path, slots[9].addr) == ("02.0/0a", "a")
    assert (slots[24].path, slots[25].path, slots[25].bus) == ("02.0/19", "03.0/01", "bridge1")


@pytest.mark.parametrize(("given", "count"), [(0, 25), (1, 1), (24, 24), (25, 25), (26, 25)])
def test_how_many_root_ports(given: int, count: int) -> None:
    assert len(Topology("q35", given, 0).controllers) == count


@pytest.mark.parametrize(("given", "count"), [(0, 1), (1, 1), (5, 5), (6, 5)])
def test_how_many_bridges(given: int, count: int) -> None:
    assert len(Topology("pc", 0, given).controllers) == count


@pytest.mark.parametrize("topology", [Topology("q35", 25, 0), Topology("pc", 0, 5)])
def test_nothing_collides_on_the_root_bus(topology: Topology) -> None:
    # 0, 1f and on `pc` 1 are the machine's own.
    taken = [*FIXED_SLOTS.values(), *(str(device.properties["addr"]) for device in topology.controllers)]
    assert len(set(taken)) == len(taken)
    lowest = 1 if topology.machine_type == "q35" else 2
    assert all(lowest <= int(addr.partition(".")[0], 16) < 0x1F for addr in taken)
    names = [
        (device.properties.get("slot"), device.properties.get("chassis_nr"))
        for device in topology.controllers
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("machine", "field"), [("q35", "default_root_ports (now 1"), ("pc", "default_bridges (now 1")]
)
def test_exhaustion_names_the_field_to_raise(machine: str, field: str) -> None:
    topology = Topology(machine, 1, 1)
    slots = [topology.allocate() for _ in range(topology.free_slots)]
    with pytest.raises(ShimError) as caught:
        topology.allocate()
    assert caught.value.code == "resource-exhausted"
    assert field in caught.value.message
    topology.free(slots[0])
    assert topology.allocate() == slots[0]


def test_reserving_what_a_record_names() -> None:
    topology = Topology("q35", 4, 0)
    slot = topology.reserve("01.0/00")
    assert (slot.bus, slot.addr) == ("port0", "0")
    assert topology.allocate().path == "01.1/00"
    with pytest.raises(ShimError, match=r"01\.0/00 is taken"):
        topology.reserve("01.0/00")
    with pytest.raises(ShimError, match="is no slot of this q35"):
        topology.reserve("02.0/01")


def test_freeing_twice_is_harmless() -> None:
    topology = Topology("q35", 2, 0)
    slot = topology.allocate()
    topology.free(slot)
    topology.free(slot)
    assert topology.free_slots == 2


def test_other_machine_types_are_refused() -> None:
    with pytest.raises(ShimError, match="machine_type: microvm is not one of: q35, pc"):
        Topology("microvm", 1, 1)
