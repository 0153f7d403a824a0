"""Many operations on one sandbox at once: each whole or not there, and guest, QEMU, host and lists agree."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from tests.live import Live, host_links, live
from tests.support import Runtime, shipped
from tests.system.network import address, compact, nic
from tests.wire import PATIENCE, Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

AT_ONCE = 16
CLIENTS = 8
OPERATIONS = 30  # of each client in a storm
STORMS = 3
NICS = 6  # that the clients of a storm contend for
# What a storm's client may be told: that another was faster.
LOST_THE_RACE = {"already-exists", "not-found", "failed-precondition", "invalid-argument"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path) -> AsyncIterator[Live]:
    """One sandbox for all tests here."""
    (root / "sandboxes" / "storm").mkdir(parents=True, mode=0o700)
    async with live(root, "storm", shipped(root)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def wire(sandbox: Live) -> AsyncIterator[Wire]:
    """A connection; when the test is over the sandbox must be as it was before it."""
    async with await Wire.connect(sandbox.socket) as connected:
        await _clear(connected)
        before = await sandbox.world()
        yield connected
        await _agree(sandbox, connected)
        await _clear(connected)
        assert await sandbox.world() == before


async def _clear(wire: Wire) -> None:
    for one in (await wire.call("kata-network.list-ifaces"))["result"] or []:
        assert (await wire.call("kata-network.del-iface", {"name": one["name"]}))["result"] is None
    assert (await wire.call("kata-network.update-routes", []))["result"] == []


async def _agree(sandbox: Live, wire: Wire) -> list[dict[str, Any]]:
    """Compare what everybody knows of the sandbox's NICs and routes; return list-ifaces."""
    listed = (await wire.call("kata-network.list-ifaces"))["result"] or []
    told = {one["name"]: (one["mac"], one["mtu"], True, sorted(one["ip"])) for one in listed}
    world = await sandbox.world()
    assert {name: link for name, link in world["guest"]["links"].items() if name != "lo"} == told
    record = world["record"]
    assert [each["interface"]["name"] for each in record] == [one["name"] for one in listed]
    assert {each["phase"] for each in record} <= {"present"}
    devices = ["nic-" + each["path"].replace("/", "-") for each in record]
    assert sorted(name for name in world["peripheral"] if name.startswith("nic-")) == sorted(devices)
    for name, each in zip(devices, record, strict=True):
        mac = await sandbox.query("qom-get", {"path": f"/machine/peripheral/{name}", "property": "mac"})
        assert mac == each["interface"]["hwAddr"]
    claims = {each["interface"]["device"]: each["interface"]["mtu"] for each in record}
    assert {name: link for name, link in host_links().items() if name != "lo"} == {
        name: (mtu, True) for name, mtu in claims.items()
    }
    assert world["devices"] == sorted(claims)
    assert world["free slots"] == 25 - len(record)
    assert world["locks"] == []
    await _agree_on_routes(sandbox, wire)
    return listed


async def _agree_on_routes(sandbox: Live, wire: Wire) -> None:
    listed = (await wire.call("kata-network.list-routes"))["result"] or []
    told = {(route["dest"], route.get("gateway"), route["device"]) for route in listed}
    tables = [json.loads(await sandbox.run("ip", "-j", family, "route")) for family in ("-4", "-6")]
    there = {
        (_network(route["dst"]), route.get("gateway"), route["dev"])
        for table in tables
        for route in table
        if not route["dst"].startswith("fe80:")
    }
    assert told == there


def _network(destination: str) -> str:
    if destination == "default" or "/" in destination:
        return destination
    return f"{destination}/{128 if ':' in destination else 32}"


def _nic(number: int, **fields: object) -> dict[str, Any]:
    return nic(number, IPAddresses=address(f"10.{number}.0.2", 24), **fields)


async def test_sixteen_nics_at_once_on_one_connection(sandbox: Live, wire: Wire) -> None:
    requests = [wire.request("kata-network.add-iface", _nic(n)) for n in range(AT_ONCE)]
    answers = await wire.answers(*requests)
    paths = {answers[request]["result"]["pciAddr"] for request in requests}
    assert paths == {f"{1 + n // 8:02}.{n % 8}/00" for n in range(AT_ONCE)}
    listed = await _agree(sandbox, wire)
    assert {one["name"] for one in listed} == {f"eth{n}" for n in range(AT_ONCE)}
    requests = [wire.request("kata-network.del-iface", {"name": f"eth{n}"}) for n in range(AT_ONCE)]
    answers = await wire.answers(*requests)
    assert [answers[request] for request in requests] == [{"id": one, "result": None} for one in requests]


async def test_sixteen_command_lines_at_once(sandbox: Live, wire: Wire, runtime: Runtime) -> None:
    async def run(command: str, value: dict[str, Any]) -> tuple[int | None, str, str]:
        process = await _command_line(runtime, command)
        out, err = await process.communicate(orjson.dumps(value))
        return process.returncode, out.decode(), err.decode()

    ended = await asyncio.gather(*(run("add-iface", nic(n)) for n in range(AT_ONCE)))
    paths = set()
    for number, (status, out, err) in enumerate(ended):
        assert (status, err) == (0, "")
        paths.add(json.loads(out)["pciAddr"])
        described = nic(number)
        keys = ("device", "name", "mtu", "hwAddr")
        assert out == compact(
            {**{key: described[key] for key in keys}, "pciAddr": json.loads(out)["pciAddr"]}
        )
    assert len(paths) == AT_ONCE
    assert len(await _agree(sandbox, wire)) == AT_ONCE
    ended = await asyncio.gather(*(run("del-iface", {"name": f"eth{n}"}) for n in range(AT_ONCE)))
    assert ended == [(0, "null\n", "")] * AT_ONCE


async def test_one_name_device_or_address_goes_to_one_of_many(sandbox: Live, wire: Wire) -> None:
    """All sixteen differ in everything but one field."""
    for field in ("name", "device", "hwAddr"):
        same = nic(0)[field]
        requests = [wire.request("kata-network.add-iface", {**nic(n), field: same}) for n in range(AT_ONCE)]
        answers = await wire.answers(*requests)
        codes = Counter(answer["error"]["code"] for answer in answers.values() if "error" in answer)
        assert codes == {"already-exists": AT_ONCE - 1}, field
        assert len(await _agree(sandbox, wire)) == 1
        await _clear(wire)


async def test_more_nics_than_slots(sandbox: Live, wire: Wire) -> None:
    requests = [wire.request("kata-network.add-iface", nic(n)) for n in range(25 + 5)]
    answers = await wire.answers(*requests)
    codes = Counter(answer["error"]["code"] for answer in answers.values() if "error" in answer)
    assert codes == {"resource-exhausted": 5}
    assert len(await _agree(sandbox, wire)) == 25


class _Client:
    """One of a storm's: does what its own random numbers say, and remembers what it was told."""

    def __init__(self, wire: Wire, seed: str) -> None:
        self._wire = wire
        self._random = random.Random(seed)
        self.told: Counter[str] = Counter()

    async def run(self, count: int) -> None:
        """Do so many operations, up to three at once."""
        while count:
            together = min(count, self._random.choice((1, 1, 2, 3)))
            requests = {self._wire.request(*operation): operation for operation in self._some(together)}
            for request, answer in (await self._wire.answers(*requests)).items():
                self._judge(requests[str(request)], answer)
            count -= together

    def _some(self, count: int) -> list[tuple[str, object]]:
        kinds = ("add", "add", "del", "update", "list", "add-route", "del-route", "list-routes")
        return [self._operation(self._random.choice(kinds)) for _ in range(count)]

    def _operation(self, kind: str) -> tuple[str, object]:
        number = self._random.randrange(NICS)
        described = _nic(number, mtu=self._random.choice((1400, 1500)))
        destination = {"dest": f"172.{self._random.randrange(16, 20)}.0.0/16"}
        match kind:
            case "add":
                return "kata-network.add-iface", described
            case "del":
                return "kata-network.del-iface", {"name": f"eth{self._random.randrange(NICS)}"}
            case "update":
                # Found by its MAC where it has another name by now.
                renamed = f"eth{self._random.choice((number, self._random.randrange(NICS)))}"
                return "kata-network.update-iface", {**described, "name": renamed}
            case "list":
                return "kata-network.list-ifaces", None
            case "add-route":
                through = {"gateway": f"10.{number}.0.1", "device": f"eth{number}"}
                return "kata-network.add-route", {**destination, **through}
            case "del-route":
                return "kata-network.del-route", destination
        return "kata-network.list-routes", None

    def _judge(self, operation: tuple[str, object], answer: dict[str, Any]) -> None:
        self.told[operation[0] + (" done" if "result" in answer else " refused")] += 1
        if "error" in answer:
            assert answer["error"]["code"] in LOST_THE_RACE, (operation, answer)


async def test_storms(sandbox: Live, wire: Wire) -> None:
    told = Counter[str]()
    for seed in range(STORMS):
        async with AsyncExitStack() as stack:
            wires = [
                await stack.enter_async_context(await Wire.connect(sandbox.socket)) for _ in range(CLIENTS)
            ]
            clients = [_Client(each, f"{seed} {number}") for number, each in enumerate(wires)]
            await asyncio.gather(*(client.run(OPERATIONS) for client in clients))
        await _agree(sandbox, wire)
        await _clear(wire)
        told += sum((client.told for client in clients), Counter[str]())
    assert sum(told.values()) == STORMS * CLIENTS * OPERATIONS
    for command in ("add-iface", "del-iface", "update-iface", "add-route", "del-route"):
        assert told[f"kata-network.{command} done"] > 0, told


@pytest.mark.parametrize("seed", range(3))
async def test_cancels_in_the_middle(sandbox: Live, wire: Wire, seed: int) -> None:
    """A request that ends as cancelled has left nothing, one that ends well is whole."""
    chance = random.Random(seed)
    requests = {wire.request("kata-network.add-iface", nic(n)): f"eth{n}" for n in range(AT_ONCE)}
    async with await Wire.connect(sandbox.socket) as other:
        for request in chance.sample(list(requests), AT_ONCE * 3 // 4):
            for _ in range(chance.randrange(12)):  # a little time, measured in round trips
                await other.call("sandbox.state")
            wire.cancel(request)
    answers = await wire.answers(*requests)
    codes = Counter(answer["error"]["code"] for answer in answers.values() if "error" in answer)
    assert set(codes) <= {"cancelled"}
    assert codes["cancelled"] > 0
    listed = await _agree(sandbox, wire)
    done = {name for request, name in requests.items() if "result" in answers[request]}
    assert {one["name"] for one in listed} == done
    again = [wire.request("kata-network.add-iface", nic(n)) for n in range(AT_ONCE) if f"eth{n}" not in done]
    assert all("result" in answer for answer in (await wire.answers(*again)).values())


@pytest.mark.parametrize("seed", range(3))
async def test_clients_that_go_in_the_middle(sandbox: Live, wire: Wire, runtime: Runtime, seed: int) -> None:
    chance = random.Random(seed)

    async def ask_and_go(number: int) -> None:
        async with await Wire.connect(sandbox.socket) as leaving:
            leaving.request("kata-network.add-iface", nic(number))
            leaving.request("kata-network.del-iface", {"name": f"eth{(number + 1) % CLIENTS}"})
            for _ in range(chance.randrange(8)):
                await wire_to_wait.call("sandbox.state")

    for _ in range(3):
        async with await Wire.connect(sandbox.socket) as wire_to_wait:
            for number in range(CLIENTS):
                await ask_and_go(number)
        await _served_only(sandbox, 1)
        await _agree(sandbox, wire)
    await asyncio.gather(*(_killed_command_line(sandbox, runtime, number) for number in range(CLIENTS)))
    await _served_only(sandbox, 1)
    await _agree(sandbox, wire)


async def _killed_command_line(sandbox: Live, runtime: Runtime, number: int) -> None:
    """Start add-iface and kill it as soon as the sandbox has begun with it."""
    process = await _command_line(runtime, "add-iface")
    assert process.stdin is not None
    process.stdin.write(orjson.dumps(nic(number)))
    process.stdin.close()
    async with asyncio.timeout(PATIENCE), await Wire.connect(sandbox.socket) as other:
        while f"eth{number}" not in (each.interface.name for each in sandbox.sandbox.record.nics):
            await other.call("sandbox.state")
    process.kill()
    await process.communicate()


async def _command_line(runtime: Runtime, command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *runtime.command("kata-network", command, "storm", "-"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=runtime.environment,
    )


async def _served_only(sandbox: Live, count: int) -> None:
    """Wait until what clients that have gone had begun is undone, or done."""
    while len(sandbox.server._connections) > count:
        await asyncio.wait(sandbox.server._connections, timeout=0.1)
    await sandbox.network.settle()
