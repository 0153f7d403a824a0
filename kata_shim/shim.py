"""containerd-shim-kata-v2: the composition root of the per-sandbox process."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import orjson

from kata_shim import log
from kata_shim.config import find_config, load
from kata_shim.contract.ids import check_id
from kata_shim.errors import ShimError
from kata_shim.faces.commands import methods
from kata_shim.faces.jsonl import Server
from kata_shim.qemu.process import raise_file_limit
from kata_shim.sandbox.host import check
from kata_shim.sandbox.sandbox import Sandbox
from kata_shim.spawn import Containerd

USAGE = """usage: containerd-shim-kata-v2 serve --root DIR --listen-fd N
           [--task-fd N --namespace NS --events PATH] ID
       containerd-shim-kata-v2 check --root DIR [--config FILE]
       containerd-shim-kata-v2 zygote --root DIR --listen-fd N
       containerd-shim-kata-v2 factory init|status|destroy --root DIR [--config FILE] [--format text|json]

Started by kata-runtime, not by hand: `serve` answers on an inherited listening socket, `check` prints what
this host offers as one JSON object, `zygote` forks shims for who connects to an inherited listening socket,
`factory` is what `kata-runtime factory` becomes.
"""
TROUBLE_TIMEOUT = 1.0  # seconds in which callers hear why the sandbox could not be taken over
REHEARSALS = 8  # as many calls of a function are followed before CPython makes it faster
START_TIMEOUT = 30.0  # seconds; a shim that nobody asks for anything leaves nothing behind


async def serve(
    root: Path, sandbox_id: str, listener: socket.socket, containerd: Containerd | None = None
) -> None:
    """Serve one sandbox until it is gone: a new one, or the one whose record stands in its directory."""
    sandbox = Sandbox(root, sandbox_id)
    tasks = None
    if containerd is not None:
        from kata_shim.faces.containerd import Tasks  # only containerd has any use for it

        tasks = Tasks(sandbox, containerd)
        await tasks.listen()
    server = Server(methods(sandbox))
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
    await server.listen(listener)
    # It may also be deleted before it was ever started.
    waits = (_live(sandbox), told_to_stop.wait(), sandbox.gone.wait())
    ends = [asyncio.ensure_future(end) for end in waits]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    # The socket is closed last: as long as it is there nobody starts another shim, to which this one's
    # operations, and its hold on QEMU's monitor, would be unknown.
    await server.finish()
    if tasks is not None:
        await tasks.close()
    await sandbox.close()
    await server.close()
    for end in ends:
        end.cancel()


async def _live(sandbox: Sandbox) -> None:
    """Return when there is nothing more to serve."""
    if not sandbox.has_lived:
        await sandbox.abandon_unless_asked(START_TIMEOUT)
    elif not await sandbox.reattach():
        await asyncio.wait((asyncio.ensure_future(sandbox.gone.wait()),), timeout=TROUBLE_TIMEOUT)
        return
    await sandbox.gone.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit status 2 for misuse."""
    os.umask(0o077)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _command(arguments)
        if command is not None:
            return command()
    except ShimError as error:
        print(f"containerd-shim-kata-v2: {error.message}", file=sys.stderr)
        return 1
    sys.stderr.write(USAGE)
    return 2


def _command(arguments: list[str]) -> Callable[[], int] | None:
    """Return what the command line asks for; None where it cannot be understood."""
    try:
        command, options, rest = _parse(arguments)
        root, config = Path(options["--root"]), options.get("--config", "")
        if command == "serve":
            (sandbox_id,) = rest
            containerd = None
            if "--task-fd" in options:
                task_fd = int(options["--task-fd"])
                containerd = Containerd(task_fd, options["--namespace"], options["--events"])
            return partial(_serve, root, check_id(sandbox_id), int(options["--listen-fd"]), containerd)
        if command == "check" and not rest:
            return partial(_check, root, config)
        if command == "zygote" and not rest:
            return partial(_zygote, int(options["--listen-fd"]))
        if command == "factory" and len(rest) == 1:
            from kata_shim.faces import factory  # only a factory has any use for it

            return partial(_factory, factory.COMMANDS[rest[0]], root, config, options.get("--format", "text"))
    except (KeyError, ValueError):
        pass
    return None


def _parse(arguments: list[str]) -> tuple[str, dict[str, str], list[str]]:
    command, *words = arguments
    options, rest = {}, []
    while words:
        word = words.pop(0)
        if word.startswith("--") and words:  # what comes last is an id, which may well be `--`
            options[word] = words.pop(0)
        else:
            rest.append(word)
    return command, options, rest


def _serve(root: Path, sandbox_id: str, listen_fd: int, containerd: Containerd | None) -> int:
    os.chdir("/")
    raise_file_limit()
    log.setup(sandbox_id)
    listener = socket.socket(fileno=listen_fd)
    os.set_inheritable(listen_fd, False)
    if containerd is not None:
        os.set_inheritable(containerd.listener, False)
    gc.freeze()  # what was imported stays: the collector need not walk it again and again
    asyncio.run(serve(root, sandbox_id, listener, containerd))
    return 0


def _check(root: Path, config: str) -> int:
    found = asyncio.run(check(root, config))
    print(orjson.dumps(found).decode())
    return 0 if found["ok"] else 1


def _zygote(listen_fd: int) -> int:
    from kata_shim.factory import zygote  # only a zygote and its children have any use for it

    log.setup("zygote")
    importlib.import_module("concurrent.futures.thread")  # imported else by the first asyncio.to_thread
    os.set_inheritable(listen_fd, False)
    asyncio.run(_rehearse())
    with suppress(ShimError):  # the shims will tell their callers
        load(find_config(None))  # the regular expressions in it are compiled once, for all shims
    zygote.serve(socket.socket(fileno=listen_fd), main)


async def _rehearse() -> None:
    """Serve a sandbox that is never started, to nobody.

    The interpreter makes the code that it runs faster, in place: done here, it is in no shim's own memory.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel finds a name
        listener.listen()
        serving = asyncio.ensure_future(serve(Path("/nonexistent"), "rehearsal", listener))
        reader, writer = await asyncio.open_unix_connection(listener.getsockname())
        for _ in range(REHEARSALS):
            writer.write(b'{"id":1,"method":"shim.ping"}\n')
            await reader.readline()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        writer.close()


def _factory(command: Callable[[Path, str, str], int], root: Path, config: str, form: str) -> int:
    try:
        return command(root, config, form)
    except ShimError as error:  # kata-runtime's own words, which has become us
        print(error.message, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or root}: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
