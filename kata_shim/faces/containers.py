"""The JSON-lines wire's methods on containers: `kata-runtime run --rootfs` and `exec`."""

from __future__ import annotations

import asyncio
import base64
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from kata_shim.agent import CANNOT_RUN
from kata_shim.contract import oci
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.fields import field
from kata_shim.faces.jsonl import Call, Handler
from kata_shim.messages import MAX_SIZE
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.disks import mount_of
from kata_shim.sandbox.sandbox import Sandbox
from kata_shim.sandbox.stdio import Stdio
from kata_shim.sandbox.task import Process

END_TIMEOUT = 5.0  # seconds from SIGKILL to a process's end


def methods(sandbox: Sandbox) -> dict[str, Handler]:
    """Return the methods, bound to `sandbox`."""

    async def run(call: Call) -> object:
        """Run a container of the sandbox's own id to its end."""
        containers = await sandbox.containers()
        args, env = words(call)
        rootfs = field(call, "rootfs", str, "")
        if not rootfs.startswith("/"):
            raise invalid(f"rootfs: {rootfs!a} is not an absolute path")
        spec = _spec(call, rootfs, args, env)
        mounts = await asyncio.to_thread(mount_of, rootfs)
        with _status_of_shells():
            await containers.create_of(sandbox.id, spec, "/", mounts, lambda: _streams(call))
        if field(call, "detach", bool, False):
            await containers.start(sandbox.id, "")
            return None
        return await _attend(call, containers, sandbox.id, "")

    return {"container.run": run}


async def execute(
    call: Call, containers: Containers, container_id: str, args: list[str], env: list[str]
) -> object:
    """Run one more process in a container to its end."""
    process = _spec(call, "/", args, env)["process"]
    exec_id = containers.new_exec_id(container_id)
    await containers.add_exec(container_id, exec_id, process, _streams(call))
    return await _attend(call, containers, container_id, exec_id)


def words(call: Call) -> tuple[list[str], list[str]]:
    """Return a command and its environment as NAME=value; raises ShimError."""
    argv, env = field(call, "argv", list, []), field(call, "env", dict, {})
    if not argv or not all(_is_word(word) for word in argv):
        raise invalid("argv: not an array of one or more strings without NUL")
    if not all(_is_word(name) and _is_word(value) and name for name, value in env.items()):
        raise invalid("env: not an object of strings without NUL")
    return argv, [f"{name}={value}" for name, value in env.items()]


def has_terminal(call: Call) -> bool:
    """Return whether the command is to have a terminal."""
    return field(call, "terminal", bool, False)


def _spec(call: Call, rootfs: str, args: list[str], env: list[str]) -> oci.Json:
    terminal = has_terminal(call)
    if terminal and not any(one.startswith("TERM=") for one in env):
        env = [*env, "TERM=xterm"]  # what container engines say, whatever it is
    spec = oci.default_spec(rootfs, args, env, field(call, "cwd", str, ""), terminal=terminal)
    size = field(call, "size", list, [])
    if terminal and size:
        if len(size) != 2 or not all(type(one) is int and 0 <= one <= MAX_SIZE for one in size):
            raise invalid(f"size: not [rows, columns], each within 0..{MAX_SIZE}")
        spec["process"]["consoleSize"] = dict(zip(("height", "width"), size, strict=True))
    return spec


async def _attend(call: Call, containers: Containers, container_id: str, exec_id: str) -> object:
    process = containers.process(container_id, exec_id)
    sizes: asyncio.Task[None] | None = None
    try:
        with _status_of_shells():
            await containers.start(container_id, exec_id)
        if process.stdio.terminal:
            sizes = asyncio.ensure_future(_follow_size(call, containers, process))
        await process.exited.wait()
        await process.stdio.drained()
    finally:
        if sizes is not None:
            sizes.cancel()
        await asyncio.shield(asyncio.ensure_future(_end(containers, process)))
    return {"exit_status": process.exit_status}


async def _follow_size(call: Call, containers: Containers, process: Process) -> None:
    """Give a process's terminal the size of its caller's."""
    with suppress(ShimError):  # the process has ended
        while True:
            rows, columns = await call.next_size()
            await containers.resize(process.container_id, process.exec_id, rows, columns)


@contextmanager
def _status_of_shells() -> Iterator[None]:
    """Add to an error what a shell's own status says of a command that cannot be run (POSIX, 2.8.2)."""
    try:
        yield
    except ShimError as error:
        if error.code in CANNOT_RUN:
            error.attrs["exit_status"] = CANNOT_RUN[error.code]
        raise


async def _end(containers: Containers, process: Process) -> None:
    """Forget a process; one whose caller has gone is killed first."""
    ids = (process.container_id, process.exec_id)
    if process.state in ("running", "paused"):
        with suppress(ShimError, TimeoutError):  # it has ended by itself, or delete tells
            async with asyncio.timeout(END_TIMEOUT):
                await containers.kill(*ids, signal.SIGKILL, everything=False)
                await process.exited.wait()
    await containers.delete(*ids)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


class _Stdin:
    """What a caller sends to a process."""

    def __init__(self, read: Callable[[], Awaitable[bytes | None]]) -> None:
        self._read = read

    async def read(self) -> bytes:
        return await self._read() or b""

    def let_end(self) -> None:
        raise ShimError("failed-precondition", "stdin: it is its caller's to end")

    def close(self) -> None:
        pass


class _Output:
    """What a process sends to its caller."""

    def __init__(self, call: Call, stream: str) -> None:
        self._call = call
        self._stream = stream

    async def write(self, data: bytes) -> None:
        await self._call.progress({self._stream: base64.b64encode(data).decode()})

    async def taken(self, count: int) -> bool:
        return True

    def end(self) -> None:
        pass

    def close(self) -> None:
        pass


def _streams(call: Call) -> Stdio:
    terminal = has_terminal(call)
    if field(call, "detach", bool, False):
        return Stdio(None, None, None, terminal=terminal)
    stdin = _Stdin(call.read_stdin) if field(call, "stdin", bool, True) else None
    error = None if terminal else _Output(call, "stderr")
    return Stdio(stdin, _Output(call, "stdout"), error, terminal=terminal)
