"""Starting a shim: forked by the factory's zygote where there is one, else exec'ed. Standard library only."""

from __future__ import annotations

import os
import sys
from _socket import SCM_RIGHTS, SOL_SOCKET, socket

from kata_shim import __version__

ZYGOTE_TIMEOUT = 1.0  # seconds; it answers in a hundredth of one
SIGNALS_OF_A_SHELL = (1, 2, 3, 13, 15, 17)  # HUP INT QUIT PIPE TERM CHLD: a caller may ignore or block them
_LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW


def spawn(root: str, sandbox_id: str, log: str, listener: int, zygote: socket | None) -> None:
    """Start the shim of `sandbox_id`, which listens at the descriptor `listener` and writes to `log`.

    `zygote` is a connection to one; that it is stopped, or cannot make this shim, is no error.
    """
    command = [sys.executable, "-I", "-m", "kata_shim.shim", "serve"]
    command += ["--root", root, "--listen-fd", "3", sandbox_id]
    if zygote is None or not _fork(zygote, command, log, listener):
        _exec(command, log, listener)


def _exec(command: list[str], log: str, listener: int) -> None:
    os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        # dup2 leaves the copy open across exec; the listener is moved first, lest 1 or 2 were its number.
        file_actions=[
            (os.POSIX_SPAWN_DUP2, listener, 3),
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, _LOG_FLAGS, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=SIGNALS_OF_A_SHELL,
    )


def _fork(zygote: socket, command: list[str], log: str, listener: int) -> bool:
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
            descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (listener, output))
            zygote.sendmsg([b"+"], [(SOL_SOCKET, SCM_RIGHTS, descriptors)])
        finally:
            os.close(output)
    except OSError:  # the exec, which is next, tells if it is the log
        return False
    return True
