"""sandbox.watch: every change of a real sandbox, as it happens, to everybody who watches."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kata_shim.sandbox.watchers import MAX_WATCHED
from tests.live import Live, live
from tests.support import shipped
from tests.system.network import address, nic
from tests.wire import Wire

pytestmark = pytest.mark.asyncio(loop_scope="module")

RUNNING = {"event": "state", "state": "running"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path) -> AsyncIterator[Live]:
    """One sandbox for all tests here; the last ones end it."""
    (root / "sandboxes" / "watched").mkdir(parents=True, mode=0o700)
    async with live(root, "watched", shipped(root)) as running:
        yield running


async def _watch(wire: Wire) -> str:
    """Begin to watch."""
    request = wire.request("sandbox.watch")
    assert await wire.receive() == {"id": request, "progress": RUNNING}
    return request


async def _events(wire: Wire, request: str, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        message = await wire.receive()
        assert message["id"] == request
        found.append(message["progress"])
    return found


async def test_every_change_is_told_to_all(sandbox: Live) -> None:
    async with (
        await Wire.connect(sandbox.socket) as first,
        await Wire.connect(sandbox.socket) as second,
        await Wire.connect(sandbox.socket) as wire,
    ):
        watches = [(each, await _watch(each)) for each in (first, second)]
        given = nic(1, IPAddresses=address("10.1.0.2", 24))
        through = {"gateway": "10.1.0.1", "device": "eth1"}
        other = {**given, "name": "other"}
        operations: list[tuple[str, object, dict[str, object] | None]] = [
            ("add-iface", given, {"event": "iface-added", "name": "eth1", "device": "tap1"}),
            ("add-iface", given, None),  # refused: nothing has changed
            (
                "add-route",
                {"dest": "172.16.0.0/16", **through},
                {"event": "route-added", "dest": "172.16.0.0/16", "device": "eth1"},
            ),
            ("add-route", {"dest": "172.16.0.0/16", **through}, None),
            ("del-route", {"dest": "172.16.0.0/16"}, {"event": "routes-deleted", "count": 1}),
            ("del-route", {"dest": "172.16.0.0/16"}, None),
            (
                "update-routes",
                [{"dest": "default", **through}],
                {"event": "routes-updated", "count": 1},
            ),
            ("list-ifaces", None, None),
            ("update-iface", other, {"event": "iface-updated", "name": "other", "device": "tap1"}),
            ("del-iface", {"name": "eth1"}, None),  # there is none of that name
            ("del-iface", other, {"event": "iface-deleted", "name": "other", "device": "tap1"}),
        ]
        for command, value, _ in operations:
            await wire.call(f"kata-network.{command}", value)
        expected = [event for _, _, event in operations if event]
        for watcher, request in watches:
            assert await _events(watcher, request, len(expected)) == expected
            watcher.cancel(request)
            assert (await watcher.answers(request))[request]["error"]["code"] == "cancelled"
        assert sandbox.sandbox._watchers._queues == set()


async def test_a_watcher_that_does_not_read_is_told_that_it_missed_some(sandbox: Live) -> None:
    """It costs the sandbox no more than the events that may wait for it."""
    async with await Wire.connect(sandbox.socket) as slow, await Wire.connect(sandbox.socket) as other:
        request = await _watch(slow)
        slow.reader._limit = 1  # type: ignore[attr-defined]  # asyncio stops reading for it
        (queue,) = sandbox.sandbox._watchers._queues
        number = 0
        while not queue.full():
            for _ in range(MAX_WATCHED // 8):
                sandbox.sandbox.announce("counted", number=number, filler="x" * 4096)
                number += 1
            await other.call("sandbox.state")
        sandbox.sandbox.announce("lost")
        slow.reader._limit = 8 << 20  # type: ignore[attr-defined]
        seen = 0
        while "progress" in (message := await slow.receive()):
            assert message["progress"]["number"] == seen
            seen += 1
        assert message == {
            "id": request,
            "error": {
                "code": "resource-exhausted",
                "message": "the watcher reads too slowly; events were lost",
            },
        }
        assert 0 < seen < number


async def test_the_end_is_told_with_its_cause_and_ends_the_watch(sandbox: Live) -> None:
    async with await Wire.connect(sandbox.socket) as watcher, await Wire.connect(sandbox.socket) as wire:
        request = await _watch(watcher)
        waiting = wire.request("sandbox.wait")
        os.kill(sandbox.sandbox.record.pid, 9)
        (stopped,) = await _events(watcher, request, 1)
        assert (stopped["event"], stopped["state"]) == ("state", "stopped")
        assert stopped["cause"].startswith("QEMU was ended by signal 9")
        state = (await wire.answers(waiting))[waiting]["result"]
        assert (state["state"], state["cause"]) == ("stopped", stopped["cause"])
        assert (await wire.call("sandbox.delete"))["result"] is None
        assert await _events(watcher, request, 1) == [{"event": "state", "state": "deleted"}]
        assert await watcher.answers(request) == {request: {"id": request, "result": None}}
