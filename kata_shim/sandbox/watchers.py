"""Who watches a sandbox: told of every change, and left behind if they do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kata_shim import log
from kata_shim.errors import ShimError

MAX_WATCHED = 1024  # events that wait for a watcher who does not read


class Watchers:
    """The watchers of one sandbox."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[dict[str, object]]] = set()

    def announce(self, event: str, **fields: object) -> None:
        """Send one event to every watcher."""
        log.debug(event, **fields)
        for queue in list(self._queues):
            if queue.full():
                self._queues.remove(queue)
            else:
                queue.put_nowait({"event": event, **fields})

    async def watch(self, tell: Callable[[object], Awaitable[None]], state: str) -> None:
        """Tell the present state, then every event, until the sandbox is deleted.

        Raises ShimError `resource-exhausted` when events were lost.
        """
        queue: asyncio.Queue[dict[str, object]] = asyncio.Queue(MAX_WATCHED)
        self._queues.add(queue)
        try:
            await tell({"event": "state", "state": state})
            while True:
                event = await queue.get()
                await tell(event)
                if event.get("state") == "deleted":
                    return
                if queue not in self._queues:
                    raise ShimError("resource-exhausted", "the watcher reads too slowly; events were lost")
        finally:
            self._queues.discard(queue)
