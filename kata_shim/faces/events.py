"""What happens to containers, told to containerd in the order in which it happened, however slow it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kata_shim import log
from kata_shim.containerd import forward_pb2
from kata_shim.containerd import task_events_pb2 as events
from kata_shim.errors import ShimError
from kata_shim.sandbox.task import Process
from kata_shim.ttrpc.client import Client

_SERVICE = "containerd.services.events.ttrpc.v1.Events"
_TIMEOUT = 5.0  # seconds for containerd to take one
_RETRY = 0.2  # seconds between tries to reach a containerd that is being restarted
_AWAY = ("unavailable", "deadline-exceeded", "data-loss")  # codes of one that is not there just now
_MOST = 2048  # events that wait; beyond them the oldest is lost, as in containerd's own shims


class Publisher:
    """Forwards events to the ttrpc socket of a containerd, which may go and come back."""

    def __init__(self, address: str, namespace: str) -> None:
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue: list[forward_pb2.Envelope] = []
        self._more = asyncio.Event()
        self._all_taken = asyncio.Event()
        self._all_taken.set()
        self._client: Client | None = None
        self._sending = asyncio.ensure_future(self._send_all())

    def tell(self, topic: str, event: Message) -> None:
        """Forward an event as soon as what came before it has been taken."""
        if len(self._queue) >= _MOST:
            log.warning("an event is lost: containerd takes none", topic=self._queue.pop(0).topic)
        self._queue.append(
            forward_pb2.Envelope(
                timestamp=timestamp(time.time_ns()),
                namespace=self._namespace,
                topic=topic,
                event=pack(event),
            )
        )
        self._more.set()
        self._all_taken.clear()

    async def close(self, timeout: float) -> None:
        """Stop, once all has been forwarded or after so many seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._all_taken.wait()
        except TimeoutError:
            log.warning("events are lost: containerd takes none", number=len(self._queue))
        self._sending.cancel()
        await asyncio.wait((self._sending,))
        if self._client is not None:
            self._client.close()
            await self._client.wait_closed()

    async def _send_all(self) -> None:
        while True:
            while not self._queue:
                self._more.clear()
                self._all_taken.set()
                await self._more.wait()
            await self._deliver(self._queue.pop(0))

    async def _deliver(self, envelope: forward_pb2.Envelope) -> None:
        """Have containerd take an event, whenever it comes back; one that it refuses is lost."""
        while True:
            try:
                await self._send(envelope)
                return
            except ShimError as error:
                if error.code not in _AWAY:
                    log.warning("an event is refused", topic=envelope.topic, error=error.message)
                    return
                log.debug("containerd takes no event", error=error.message)
            await asyncio.sleep(_RETRY)

    async def _send(self, envelope: forward_pb2.Envelope) -> None:
        if self._client is None or self._client.cause is not None:
            self._client = await Client.connect(self._address, name="containerd's events")
        request = forward_pb2.ForwardRequest(envelope=envelope)
        await self._client.call(_SERVICE, "Forward", request, Empty, _TIMEOUT)


def pack(message: Message) -> Any:
    """Return a message in an Any whose type has no host in its name, as containerd has it."""
    return Any(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def timestamp(nanoseconds: int) -> Timestamp:
    """Return a time, given in ns since 1970."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return Timestamp(seconds=seconds, nanos=rest)


def teller(publisher: Publisher, pid: Callable[[], int]) -> Callable[[str, Process], None]:
    """Return what forwards a container's events; `pid` tells the sandbox's."""

    def tell(event: str, process: Process) -> None:
        topic, message = _event(event, process, pid())
        publisher.tell(topic, message)

    return tell


def _event(event: str, process: Process, pid: int) -> tuple[str, Message]:
    container_id, exec_id = process.container_id, process.exec_id
    at = timestamp(process.exited_at)
    status = process.exit_status
    match event:
        case "create":
            stdin, stdout, stderr = process.stdio.paths
            streams = events.TaskIO(
                stdin=stdin, stdout=stdout, stderr=stderr, terminal=process.stdio.terminal
            )
            return "/tasks/create", events.TaskCreate(
                container_id=container_id, bundle=process.bundle, io=streams, pid=pid
            )
        case "start":
            return "/tasks/start", events.TaskStart(container_id=container_id, pid=pid)
        case "exec-added":
            return "/tasks/exec-added", events.TaskExecAdded(container_id=container_id, exec_id=exec_id)
        case "exec-started":
            return "/tasks/exec-started", events.TaskExecStarted(
                container_id=container_id, exec_id=exec_id, pid=pid
            )
        case "exit":
            return "/tasks/exit", events.TaskExit(
                container_id=container_id,
                id=exec_id or container_id,
                pid=pid,
                exit_status=status,
                exited_at=at,
            )
        case "delete":
            return "/tasks/delete", events.TaskDelete(
                container_id=container_id, id=exec_id, pid=pid, exit_status=status, exited_at=at
            )
        case "paused":
            return "/tasks/paused", events.TaskPaused(container_id=container_id)
        case "resumed":
            return "/tasks/resumed", events.TaskResumed(container_id=container_id)
        case "oom":
            return "/tasks/oom", events.TaskOOM(container_id=container_id)
    raise AssertionError(event)
