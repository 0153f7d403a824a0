"""The way to a sandbox's shim: a connection to the one that runs, or to one that is started.

Standard library only, and quick to import: whoever calls lives for milliseconds.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket

from kata_shim.client import Connection
from kata_shim.errors import ShimError
from kata_shim.registry import sandbox_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kata_shim.spawn import Containerd

MAX_SUN_PATH = 107  # bytes of a socket's path (unix(7))


def connect(
    root: str,
    sandbox_id: str,
    warn: Callable[[str], None] | None = None,
    *,
    revive: bool = True,
    containerd: Containerd | None = None,
) -> Connection:
    """Connect to the shim of `sandbox_id`, a full id; with `revive`, start one where none is running.

    Any number of callers at once start one shim, `containerd`'s if given. Raises ShimError: `not-found`
    without such a sandbox, `unavailable` where no shim runs and none is to be started; OSError where it
    cannot be started.
    """
    directory = sandbox_directory(root, sandbox_id)
    sock = _dial(directory)
    if sock is None and revive:
        sock = _start_shim(root, sandbox_id, directory, containerd)
    if sock is None:
        raise ShimError("unavailable", f"no shim of {sandbox_id} is running")
    return Connection(sock, directory, warn)


def _dial(directory: str) -> socket | None:
    """Return a socket connected to the shim of `directory`, or None where nobody listens."""
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        _at_path(directory, "shim.sock", sock.connect)
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        return None
    return sock


def _dial_zygote(root: str) -> socket | None:
    """Return a socket connected to the factory's zygote, or None; it does not wait."""
    sock = socket(AF_UNIX, SOCK_STREAM)
    sock.setblocking(False)
    try:
        _at_path(f"{root}/factory", "zygote.sock", sock.connect)
    except OSError:
        sock.close()
        return None
    return sock


def _at_path(directory: str, name: str, act: Callable[[str], None]) -> None:
    """Call `act` with a path of the directory's socket that fits into a socket address (unix(7))."""
    path = f"{directory}/{name}"
    if len(os.fsencode(path)) <= MAX_SUN_PATH:
        act(path)
        return
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        act(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)


def _start_shim(root: str, sandbox_id: str, directory: str, containerd: Containerd | None) -> socket | None:
    """Start a shim unless someone else has meanwhile, and return a socket connected to it."""
    from kata_shim.spawn import spawn

    lock = _take_lock(sandbox_id, f"{directory}/lock")
    try:
        sock = _dial(directory)
        if sock is not None:
            return sock
        listener = _listen(directory)
        try:
            zygote = _dial_zygote(root)
            try:
                log = f"{directory}/shim.log"
                spawn(root, sandbox_id, log, listener.fileno(), zygote, containerd)
            finally:
                if zygote is not None:
                    zygote.close()
            # Before our own copy of the listener is closed: if the shim dies at once, this connection is
            # reset and tells, where a later one would only be refused.
            return _dial(directory)
        finally:
            listener.close()
    finally:
        os.close(lock)


def _take_lock(sandbox_id: str, path: str) -> int:
    import fcntl

    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # While we waited the sandbox may have been deleted, and even made again with a lock of its own.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except (FileNotFoundError, NotADirectoryError):
            raise ShimError("not-found", f"no such container ID ({sandbox_id})") from None
        os.close(lock)


def _listen(directory: str) -> socket:
    """Return a socket listening at the directory's shim.sock, mode 0600, in the place of a dead shim's."""
    try:  # noqa: SIM105  contextlib is slow to import
        os.unlink(f"{directory}/shim.sock")
    except FileNotFoundError:
        pass
    listener = socket(AF_UNIX, SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        _at_path(directory, "shim.sock", listener.bind)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener
