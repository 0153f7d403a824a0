"""kata-runtime run: starts a sandbox; quick to import, for the start is what its caller waits for."""

from __future__ import annotations

import os

# json and signal.py, which turns every constant into an enum, take longer to import than all else here.
from _json import encode_basestring
from _signal import (  # type: ignore[import-not-found]  # typeshed has only signal.py
    SIG_IGN,
    SIGINT,
    SIGTERM,
    default_int_handler,
    signal,
)

from kata_shim import client, registry, shims
from kata_shim.cli.terminal import ProgressLine, say
from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments
    from kata_shim.cli.tty import Terminal


def run(arguments: Arguments) -> int:
    """Start a sandbox; without --detach, stay until it stops or a signal ends it, and delete it then.

    With --rootfs a container runs in it, of whose command streams and status are ours then.

    SIGINT, SIGTERM and the guest's power-off are the ordinary end of an attached sandbox: exit status 0; any
    other end is said, and is status 1. Whatever goes wrong before it runs leaves nothing behind.
    """
    root, sandbox_id, *argv = arguments.root, *arguments.words
    container, terminal = _container(arguments, argv)
    config = b"null"
    if arguments.has("--config"):
        text = encode_basestring(os.path.abspath(arguments.last("--config")))
        config = text.encode("utf-8", "backslashreplace")
    signal(SIGTERM, default_int_handler)
    claimed: os.stat_result | None = registry.claim(root, sandbox_id)
    line = ProgressLine()
    try:
        connection = shims.connect(root, sandbox_id, line.say)
        connection.call("sandbox.start", b'{"config":%b}' % config, line.show if line.is_shown else None)
    except BaseException:
        line.clear()
        assert claimed is not None
        _discard(root, sandbox_id, claimed)
        raise
    line.clear()
    if arguments.has("--detach") and container is None:
        return 0
    cause = ""
    try:
        if container is not None:
            from kata_shim.cli.execute import attend, encode

            if not arguments.has("--detach"):
                return attend(connection, "container.run", container, terminal)
            connection.call("container.run", encode(container))
            claimed = None
            return 0
        cause = _wait(connection)
    except client.CancelledError:
        if container is not None:  # which has not started
            raise
    finally:
        if claimed is not None:
            _discard(root, sandbox_id, claimed)
    if cause:
        say(f"{sandbox_id} has stopped: {cause}")
    return 1 if cause else 0


def _container(arguments: Arguments, argv: list[str]) -> tuple[dict[str, Any] | None, Terminal | None]:
    """Return what says which container is to be run, None without one, and our terminal if it has that."""
    from kata_shim.cli.arguments import UsageError

    if not arguments.has("--rootfs"):
        if argv or any(arguments.has(flag) for flag in ("--env", "--cwd", "--tty", "-t")):
            raise UsageError("a command needs --rootfs")
        return None, None
    from kata_shim.cli.execute import command, terminal_of

    container = command(arguments, argv or ["/bin/sh"])
    container["rootfs"] = os.path.abspath(arguments.last("--rootfs"))
    container["detach"] = arguments.has("--detach")
    terminal = terminal_of(arguments, container)
    if terminal is not None and container["detach"]:
        raise UsageError("--detach: it leaves the terminal that --tty is for")
    return container, terminal


def _wait(connection: client.Connection) -> str:
    """Wait for the sandbox's end and return its cause, "" if it was an ordinary one."""
    result = connection.call("sandbox.wait")
    import json

    return str(json.loads(result).get("cause", ""))


def _discard(root: str, sandbox_id: str, claimed: os.stat_result) -> None:
    """Delete our sandbox whatever its state, by its shim where there is one or something that needs one.

    One that has gone may have been followed by somebody else's of the same id, which is let alone. Signals
    wait meanwhile. What could not be deleted is said, not raised: the caller has a cause of its own.
    """
    from kata_shim.cli import silent

    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_IGN)
    directory = registry.sandbox_directory(root, sandbox_id)
    cause: Exception | None = None
    # Twice: a QEMU that is just being started has the socket of a shim that dies then open for a moment.
    for _ in range(2):
        if not _is_still(directory, claimed):
            return
        recorded = os.path.lexists(f"{directory}/record.json")
        try:
            silent.delete(root, sandbox_id, force=True, revive=recorded)
            return
        except (ShimError, OSError) as error:
            cause = error
    if not _is_still(directory, claimed):
        return
    try:
        registry.remove(root, sandbox_id)
    except ShimError as remaining:
        say(f"{cause}")
        say(f"{remaining}; `kata-runtime delete --force {sandbox_id}` tries again")


def _is_still(directory: str, claimed: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(directory), claimed)
    except FileNotFoundError:
        return False
