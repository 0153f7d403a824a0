"""Whether all who know of NICs, routes and rules tell the same: guest, QEMU, host, record and our lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.floor import monitor
from bench.stand import SANDBOX, Stand

if TYPE_CHECKING:
    from bench.load import Owned

Iface = tuple[str, str, int, str]  # name, MAC, MTU, address
Route = tuple[str, str, str]  # destination, gateway, device
IFF_UP = 1


def ifaces(owned: Iterable[Owned]) -> set[Iface]:
    """What list-ifaces must say."""
    return {
        (
            nic["name"],
            nic["hwAddr"],
            nic["mtu"],
            "{address}/{mask}".format(**nic["IPAddresses"][0]),
        )
        for nic in _nics(owned)
    }


def routes(owned: Iterable[Owned]) -> set[Route]:
    """What list-routes must say."""
    found = set()
    for one in owned:
        if one.nic is not None:
            device, address = one.nic["name"], one.nic["IPAddresses"][0]["address"]
            found.add((f"{address.rpartition('.')[0]}.0/24", "", device))
            found |= {(dest, gateway, device) for dest, gateway in one.routes}
    return found


def own_ifaces(told: list[Any], device: str = "") -> set[Iface]:
    """What list-ifaces says, of one NIC if it is named."""
    return {
        (one["name"], one["mac"], one["mtu"], *one["ip"])
        for one in told
        if not device or one["name"] == device
    }


def own_routes(told: list[Any], device: str = "") -> set[Route]:
    """What list-routes says, over one NIC if it is named."""
    return {
        (one["dest"], one.get("gateway", ""), one["device"])
        for one in told
        if not device or one["device"] == device
    }


def differences(what: str, told: set[Any], must: set[Any]) -> list[str]:
    """Return a line for each that is told and must not be, or the other way round."""
    return [f"{what}: {one} is too much" for one in sorted(told - must)] + [
        f"{what}: {one} is missing" for one in sorted(must - told)
    ]


def everywhere(stand: Stand, owned: list[Owned]) -> list[str]:
    """Return every inconsistency: as it is, for the next shim, and when all has been deleted."""
    found = list(_look(stand, owned))
    # Who wants QEMU's monitor ends the shim; the next one must tell the same.
    stand.kill_shim()
    found += differences("QEMU", _macs(stand), {nic["hwAddr"] for nic in _nics(owned)})
    found += [f"the next shim: {line}" for line in _look(stand, owned)]
    for nic in _nics(owned):
        stand.cli(*stand.network("del-iface", stand.document({"name": nic["name"]}))[1:])
    stand.cli("kata-ipvs", "ipvsadm", "--dialect", "ipvsadm", "--parameters", "-C", SANDBOX)
    found += [f"when all was deleted: {line}" for line in _look(stand, [])]
    stand.kill_shim()
    return found + differences("QEMU, when all was deleted", _macs(stand), set())


def _nics(owned: Iterable[Owned]) -> list[dict[str, Any]]:
    return [one.nic for one in owned if one.nic is not None]


def _look(stand: Stand, owned: list[Owned]) -> Iterator[str]:
    cards, ways = ifaces(owned), routes(owned)
    rules = {rule for one in owned for rule in one.rules()}
    listed = json.loads(stand.cli(*stand.network("list-ifaces")[1:])) or []
    yield from differences("list-ifaces", own_ifaces(listed), cards)
    listed = json.loads(stand.cli(*stand.network("list-routes")[1:])) or []
    yield from differences("list-routes", own_routes(listed), ways)
    told = stand.cli("kata-ipvs", "ipvsadm", "--dialect", "ipvsadm", "--parameters", "-S -n", SANDBOX)
    yield from differences("kata-ipvs", set(told.splitlines()), rules)
    there = {
        (link["ifname"], link["address"], link["mtu"], f"{one['local']}/{one['prefixlen']}")
        for link in json.loads(_in_guest(stand, "ip", "-j", "addr"))
        for one in link["addr_info"]
        if link["ifname"] != "lo" and one["family"] == "inet"
    }
    yield from differences("the guest's ip addr", there, cards)
    table = {
        (route["dst"], route.get("gateway", ""), route["dev"])
        for route in json.loads(_in_guest(stand, "ip", "-j", "route"))
    }
    yield from differences("the guest's ip route", table, ways)
    saved = set(_in_guest(stand, "ipvsadm", "-Sn").splitlines())
    yield from differences("the guest's ipvsadm", saved, rules)
    yield from differences("the host", set(_taps()), {(nic["device"], nic["mtu"]) for nic in _nics(owned)})
    record = json.loads((stand.directory / "record.json").read_text())["nics"]
    phases = {(nic["interface"]["name"], nic["phase"]) for nic in record}
    yield from differences("the record", phases, {(nic["name"], "present") for nic in _nics(owned)})


def _macs(stand: Stand) -> set[str]:
    """Return what cards QEMU has; the shim is dead."""
    with monitor(stand) as ask:
        return {card["main-mac"] for card in ask("query-rx-filter")}


def _in_guest(stand: Stand, *argv: str) -> str:
    return stand.cli("exec", SANDBOX, "--", *argv)


def _taps() -> Iterator[tuple[str, int]]:
    """Yield the host's devices that are up, which all are the sandbox's but `lo`."""
    for device in Path("/sys/class/net").iterdir():
        up = int((device / "flags").read_text(), 16) & IFF_UP
        if device.name != "lo" and up:
            yield device.name, int((device / "mtu").read_text())
