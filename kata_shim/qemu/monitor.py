"""QEMU's monitor: QMP over the library qemu.qmp, with one clear error when QEMU goes away.

Reference: QEMU's docs/interop/qmp-spec.rst and qapi/*.json.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)
from qemu.qmp.models import Greeting

from kata_shim.errors import ShimError

CONNECT_TIMEOUT = 5.0
COMMAND_TIMEOUT = 10.0
T = TypeVar("T")

# The library logs every broken connection as an error; we report those ourselves, once and in words.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class _Client(QMPClient):
    """The library's client with three habits changed.

    It does not print every message prettily for a debug log that nobody reads. It does not ask for
    out-of-band execution: with that QEMU reads on while it runs a command, and its two threads use a
    descriptor just passed without a lock (7.2's chardev/char-socket.c), so that it may crash, or hang in a
    tap that has become blocking. And it may follow a client that was cut, whose answers QEMU still has to
    give: those come before the greeting, or later under ids that are not ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self._execute_id = secrets.randbits(48)

    async def _get_greeting(self) -> Greeting:
        while "QMP" not in (message := await self._recv()):
            if not message.keys() & {"return", "error", "event"}:
                break
        greeting = Greeting(message)
        greeting.QMP.capabilities = [name for name in greeting.QMP.capabilities if name != "oob"]
        return greeting

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class CommandError(ShimError):
    """QEMU refused a command; `error_class` is QMP's (`GenericError`, `DeviceNotFound`, …)."""

    def __init__(self, command: str, error_class: str, text: str) -> None:
        super().__init__(
            "not-found" if error_class == "DeviceNotFound" else "internal", f"QEMU, {command}: {text}"
        )
        self.error_class = error_class


class Lent(NamedTuple):
    """A descriptor of QEMU's: its number, and that of the set by which QEMU opens it."""

    fd: int
    fdset: int

    @property
    def path(self) -> str:
        """The name by which QEMU opens the very same open file once more."""
        return f"/dev/fdset/{self.fdset}"


class Monitor:
    """One connection to a QEMU's monitor.

    Callers may send at any time: commands are pipelined and QEMU answers them in order. When the connection
    ends, whoever waits and whoever comes later gets ShimError `unavailable` with the cause.
    """

    def __init__(self, client: QMPClient, sock: socket.socket, explain: Callable[[], str]) -> None:
        self._client = client
        self._socket = sock
        self._explain = explain
        self._fd_lock = asyncio.Lock()
        self._fdsets = itertools.count()
        self._ending = asyncio.Event()
        self.closed: asyncio.Future[ShimError] = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def connect(
        cls, path: Path, *, timeout: float = CONNECT_TIMEOUT, explain: Callable[[], str] = str
    ) -> Monitor:
        """Connect and negotiate.

        `explain` is asked for QEMU's last words when the connection is lost. `timeout` is in seconds: QEMU
        serves one client at a time, and lets the next wait without a word. Raises ShimError `unavailable`
        when nobody answers, or not with QMP, or not in time.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = _Client()
        # The library keeps every event for readers of `client.events`, for ever; nobody reads there.
        client.events.event_filter = lambda _event: False
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(sock, str(path))
                await client.connect(sock)
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                why = f"no QMP greeting within {timeout:g} s"
            elif isinstance(error, OSError | QMPError):
                why = _first_line(error)
            else:
                raise
            raise ShimError("unavailable", _with_cause(f"QEMU's monitor {path}: {why}", explain)) from error
        return cls(client, sock, explain)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> object:
        """Run one command and return its value.

        Raises CommandError when QEMU refuses, ShimError `deadline-exceeded` after `timeout` seconds (the
        command may still take effect), `unavailable` when QEMU goes away.
        """
        if self.closed.done():
            raise self._unavailable()
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandError(command, error.error_class, str(error)) from None
        except TimeoutError:
            raise ShimError("deadline-exceeded", f"QEMU, {command}: no answer within {timeout:g} s") from None
        except (ExecInterruptedError, StateError):
            await asyncio.wait([self.closed])
            raise self._unavailable() from None
        except QMPError as error:
            raise ShimError("internal", f"QEMU, {command}: {_first_line(error)}") from error

    async def pass_fd(self, name: str, fd: int, *, timeout: float = COMMAND_TIMEOUT) -> None:
        """Give QEMU a duplicate of `fd` under `name` (QMP `getfd`); a descriptor of that name is replaced.

        The caller keeps its own. Raises as `execute`.
        """
        async with self._fd_lock:
            self._send_fd(fd)
            await run_to_end(self.execute("getfd", {"fdname": name}, timeout=timeout))

    @asynccontextmanager
    async def lend_fd(self, fd: int, *, timeout: float = COMMAND_TIMEOUT) -> AsyncIterator[Lent]:
        """Let QEMU have a duplicate of `fd` while the body runs (QMP `add-fd`), and yield where it has it.

        What it opens meanwhile by the name of the set it keeps. Raises as `execute`.
        """
        fdset = {"fdset-id": next(self._fdsets)}
        try:
            async with self._fd_lock:
                self._send_fd(fd)
                added = await run_to_end(self.execute("add-fd", fdset, timeout=timeout))
            assert isinstance(added, dict)
            yield Lent(added["fd"], added["fdset-id"])
        finally:
            with suppress(ShimError):
                await run_to_end(self.execute("remove-fd", fdset, timeout=timeout))

    def _send_fd(self, fd: int) -> None:
        """Send a descriptor. QEMU keeps only the last, so a command must take it before the next comes."""
        if self.closed.done():
            raise self._unavailable()
        try:
            # White space between two commands: a descriptor has to travel with at least one byte.
            socket.send_fds(self._socket, [b" "], [fd])
        except OSError as error:
            raise ShimError("unavailable", f"QEMU's monitor: passing a file: {error.strerror}") from error

    async def version(self) -> tuple[int, int]:
        """Return QEMU's major and minor version; raises as `execute`."""
        answer = await self.execute("query-version")
        assert isinstance(answer, dict)
        number = answer["qemu"]
        return number["major"], number["minor"]

    @asynccontextmanager
    async def events(
        self, *names: str, accept: Callable[[Mapping[str, object]], bool] | None = None
    ) -> AsyncIterator[Events]:
        """Listen for events whose `data` passes `accept`, from before the body runs until it ends."""

        def matches(event: Message) -> bool:
            data = event.get("data")
            return accept is None or accept(data if isinstance(data, Mapping) else {})

        with self._client.listener(names, matches) as listener:
            yield Events(self, listener)

    async def close(self) -> None:
        """End the connection; QEMU goes on running."""
        self._ending.set()
        await asyncio.wait([self._watcher])

    async def _watch(self) -> None:
        """Disconnect when QEMU or we end the connection, and tell everyone why."""
        ending = asyncio.create_task(self._ending.wait())
        lost = asyncio.create_task(self._client.runstate_changed())
        try:
            if self._client.runstate is Runstate.RUNNING:
                await asyncio.wait([ending, lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ending.cancel()
            lost.cancel()
            cause = "QEMU's monitor: the connection has ended"
            try:
                cause = await self._disconnect()
                if self._ending.is_set():
                    cause = "QEMU's monitor: the connection was closed by us"
                else:
                    cause = _with_cause(cause, self._explain)
            finally:
                # Whatever went wrong here: everyone who waits for an answer waits for this.
                self.closed.set_result(ShimError("unavailable", cause))

    async def _disconnect(self) -> str:
        try:
            await self._client.disconnect()
        except EOFError:
            pass
        except Exception as error:  # also what reading its answers raised: RecursionError, for one
            return f"QEMU's monitor broke off: {_first_line(error)}"
        return "QEMU has gone away"

    def _unavailable(self) -> ShimError:
        cause = self.closed.result()
        return ShimError(cause.code, cause.message)


class Events:
    """The events that came since listening began, oldest first."""

    def __init__(self, monitor: Monitor, listener: EventListener) -> None:
        self._monitor = monitor
        self._listener = listener

    async def next(self) -> Mapping[str, object]:
        """Wait for the next event: `{"event", "data", "timestamp"}`.

        Raises ShimError `unavailable` when QEMU goes away first. No timeout of its own.
        """
        getting = asyncio.ensure_future(self._listener.get())
        either: list[asyncio.Future[Any]] = [getting, self._monitor.closed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            raise self._monitor._unavailable()
        finally:
            getting.cancel()


async def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end; a cancellation meanwhile takes effect only then."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and not task.cancelled():
        task.exception()
        raise cancelled
    return task.result()


def _with_cause(text: str, explain: Callable[[], str]) -> str:
    cause = explain()
    return f"{text}: {cause}" if cause else text


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
