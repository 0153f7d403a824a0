"""Starting a shim: forked by the factory's zygote where there is one, else exec'ed. Standard library only."""

from __future__ import annotations

import os
import sys
from _socket import SCM_RIGHTS, SOL_SOCKET, socket

from kata_shim import __version__

ZYGOTE_TIMEOUT = 1.0  # seconds; it answers in a hundredth of one
SIGNALS_OF_A_SHELL = (1, 2, 3, 13, 15, 17)  # HUP INT QUIT PIPE TERM CHLD: a caller may ignore or block them
FIRST_LISTENER = 3  # the descriptor of the shim's first listening socket
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW


class Containerd:
    """What a shim of containerd's has beside: where it listens, its namespace, and where events go."""

    def __init__(self, listener: int, namespace: str, events: str) -> None:
        self.listener = listener
        self.namespace = namespace
        self.events = events


def spawn(
    root: str,
    sandbox_id: str,
    log: str,
    listener: int,
    zygote: socket | None,
    containerd: Containerd | None = None,
) -> None:
    """Start the shim of `sandbox_id`, which listens at the descriptor `listener` and writes to `log`.

    With `containerd` it is one of containerd's as well. `zygote` is a connection to one; that it is stopped,
    or cannot make this shim, is no error.
    """
    command = [sys.executable, "-I", "-m", "kata_shim.shim", "serve"]
    command += ["--root", root, "--listen-fd", "3"]
    listeners = [listener]
    if containerd is not None:
        command += ["--task-fd", "4", "--namespace", containerd.namespace, "--events", containerd.events]
        listeners.append(containerd.listener)
    command.append(sandbox_id)
    if zygote is None or not _fork(zygote, command, log, listeners):
        _exec(command, log, listeners)


def _exec(command: list[str], log: str, listeners: list[int]) -> None:
    # Moved out of the way first, lest one's number were the place of another; then to their places.
    moved = [_above(listener, FIRST_LISTENER + len(listeners)) for listener in listeners]
    try:
        _exec_with(command, log, moved)
    finally:
        for descriptor in moved:
            os.close(descriptor)


def _above(descriptor: int, least: int) -> int:
    """Return a copy of a descriptor whose number is not below `least`."""
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    return fcntl(descriptor, F_DUPFD_CLOEXEC, least)


def _exec_with(command: list[str], log: str, listeners: list[int]) -> None:
    os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[
            # dup2 leaves the copy open across exec.
            *(
                (os.POSIX_SPAWN_DUP2, listener, place)
                for place, listener in enumerate(listeners, FIRST_LISTENER)
            ),
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, _LOG_FLAGS, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=SIGNALS_OF_A_SHELL,
    )


def _fork(zygote: socket, command: list[str], log: str, listeners: list[int]) -> bool:
    """Have the zygote fork a shim (the wire: kata_shim/factory/zygote.py).

    False when it does not within ZYGOTE_TIMEOUT; nor will it then, for the shim needs what we send last.
    """
    fields = [__version__, sys.getfilesystemencoding(), str(len(command)), *command]
    words = [os.fsencode(field) for field in fields]
    words += [key + b"=" + value for key, value in os.environb.items()]
    request = b"\0".join(words)
    zygote.settimeout(ZYGOTE_TIMEOUT)
    try:
        zygote.sendall(len(request).to_bytes(4, "big") + request)
        if zygote.recv(1) != b"+":
            return False
        output = os.open(log, _LOG_FLAGS | os.O_CLOEXEC, 0o600)
        try:
            descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (output, *listeners))
            zygote.sendmsg([b"+"], [(SOL_SOCKET, SCM_RIGHTS, descriptors)])
        finally:
            os.close(output)
    except OSError:  # the exec, which is next, tells if it is the log
        return False
    return True
