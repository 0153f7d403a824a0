"""A process that has imported all that a shim needs, and forks one in the time that a system call takes.

The shim is what its caller would have got by exec'ing it (likeness.py); what cannot be made so is refused,
and then the caller execs. Only the address space's layout and the seed of hash() are the zygote's own.

The wire, on a unix stream socket, one connection a shim (kata_shim/spawn.py is the other end):
  caller    the length of what follows (4 bytes, big endian, at most MAX_REQUEST), then separated by NULs: our
            version, the encoding of file names, the number of words of the command line, these words, and
            the environment as KEY=VALUE
  child     "+": it could serve now; or "-" and why it can not, or nothing at all: the caller execs
  caller    one byte with SCM_RIGHTS: the log for stdout and stderr, and one or two listening sockets
Without these descriptors nothing can be served, so there are never two shims, whoever is killed, or gives
up by closing the connection, whenever it may be. And the caller has lived until it sent them, so what was
read of its pid (SO_PEERCRED) was its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from fcntl import F_DUPFD, fcntl
from typing import NamedTuple, NoReturn

from kata_shim import __version__, log
from kata_shim.errors import ShimError, invalid
from kata_shim.factory import likeness
from kata_shim.spawn import FIRST_LISTENER

READ_TIMEOUT = 1.0  # seconds; a request is written at once
MAX_REQUEST = 1024 * 1024
MOST_DESCRIPTORS = 3
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Run = Callable[[list[str]], int]
_Stamp = tuple[int, int, int]


class _Self(NamedTuple):
    pid: int
    stamps: dict[bytes, _Stamp]


class _Request(NamedTuple):
    command: list[bytes]
    environment: dict[bytes, bytes]


def serve(listener: socket.socket, run: Run) -> NoReturn:
    """Fork a shim for every caller; `run` gets its arguments and returns its exit status.

    The process that called listen(2) must be our parent; we die with it, the shims live on. Nothing of a
    caller is looked at here, so none can hold up the next, or leave anything in the memory of those to come.
    """
    _die_with_starter(listener)
    _require_one_thread()
    likeness.reset_signals()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps our children
    # As we are already: a kernel that cannot do this is told of now. And what the interpreter remembers of
    # the first time, such as which class counts as which, is in no shim's own memory.
    words = [os.fsencode(word) for word in sys.orig_argv]
    _become(os.getpid(), _Request(words, dict(os.environb)))
    own = _Self(os.getpid(), _stamps())
    gc.collect()
    gc.freeze()
    while True:
        connection, _ = listener.accept()
        try:
            if os.fork() == 0:
                _child(listener, connection, own, run)
        except OSError as error:
            log.warning("cannot fork", error=error.strerror)
        connection.close()


def _die_with_starter(listener: socket.socket) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    starter, _, _ = _peer(listener)
    if os.getppid() != starter:
        raise ShimError("failed-precondition", f"the process that listens ({starter}) is not our parent")


def _require_one_thread() -> None:
    if len(os.listdir("/proc/self/task")) != 1:
        raise ShimError("internal", "a module that the shim imports has started a thread: fork would lose it")


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, uid and gid of who connected; of a listening socket, of who called listen(2)."""
    pid, uid, gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def _stamps() -> dict[bytes, _Stamp]:
    """Return what tells whether the files of our modules are still those that we have imported."""
    files = {module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "kata_shim"}
    paths = [os.fsencode(file) for file in files if file is not None]
    return {path: _stamp(path) for path in paths}


def _stamp(path: bytes) -> _Stamp:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _child(listener: socket.socket, connection: socket.socket, zygote: _Self, run: Run) -> NoReturn:
    """Become the shim that the caller asks for, or end."""
    status = 1
    try:
        listener.close()
        connection.settimeout(READ_TIMEOUT)
        try:
            request = _prepare(connection, zygote)
        except Exception as error:
            _refuse(connection, error)
        else:
            if _take_over(connection):
                status = run([os.fsdecode(word) for word in request.command[likeness.ARGUMENTS :]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _refuse(connection: socket.socket, error: Exception) -> None:
    reason = error.message if isinstance(error, ShimError) else f"{type(error).__name__}: {error}"
    log.warning("no shim is forked, its caller has to exec it", reason=reason)
    with suppress(OSError):  # it may have gone
        connection.sendall(b"-" + reason.encode(errors="replace"))


def _prepare(connection: socket.socket, zygote: _Self) -> _Request:
    """Be all of the shim that can be without its socket. Raises ShimError or OSError where that cannot be."""
    caller, uid, _ = _peer(connection)
    if uid != os.geteuid():
        raise ShimError("permission-denied", f"uid {uid} asks, which is not ours")
    data = _read(connection)
    _require_up_to_date(zygote)
    request = _parse(data)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _become(caller, request)
    return request


def _become(caller: int, request: _Request) -> None:
    likeness.become(caller)
    os.chdir("/")
    os.environb.clear()
    os.environb.update(request.environment)
    time.tzset()
    likeness.rename(request.command[0], request.command, request.environment)


def _require_up_to_date(zygote: _Self) -> None:
    """Raise ShimError, and end the zygote, when it has imported what is no longer installed.

    Whoever started it starts another, which is up to date.
    """
    for path, stamp in zygote.stamps.items():
        with suppress(FileNotFoundError, NotADirectoryError):
            if _stamp(path) == stamp:
                continue
        if os.getppid() == zygote.pid:  # else it has ended already
            os.kill(zygote.pid, signal.SIGTERM)
        raise ShimError("failed-precondition", f"{os.fsdecode(path)} has changed since it was imported")


def _read(connection: socket.socket) -> bytes:
    """Return the request. Raises TimeoutError for one that does not come whole within READ_TIMEOUT."""
    deadline = time.monotonic() + READ_TIMEOUT
    length = int.from_bytes(_read_bytes(connection, 4, deadline))
    if length > MAX_REQUEST:
        raise invalid(f"a request of {length} bytes is longer than {MAX_REQUEST}")
    return _read_bytes(connection, length, deadline)


def _read_bytes(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(length - len(data))
        if not chunk:
            raise invalid("the caller went before its request was whole")
        data += chunk
    return bytes(data)


def _parse(data: bytes) -> _Request:
    """Return what is asked for. Raises ShimError where another program than we would be exec'ed."""
    version, encoding, count, *fields = data.split(b"\0")
    if version != __version__.encode():
        raise ShimError("failed-precondition", f"the caller is version {version!r}, we are {__version__}")
    if encoding != sys.getfilesystemencoding().encode():
        raise ShimError("failed-precondition", f"file names are {encoding!r} for the caller, not for us")
    command, environment = fields[: int(count)], fields[int(count) :]
    likeness.require_program(command)
    return _Request(command, dict(_variable(field) for field in environment))


def _variable(field: bytes) -> tuple[bytes, bytes]:
    key, equals, value = field.partition(b"=")
    if not (key and equals):
        raise invalid(f"{field!r} is no variable of an environment")
    return key, value


def _take_over(connection: socket.socket) -> bool:
    """Tell the caller that we can serve and take what to serve with; False when it does not give it.

    There is no timeout: the caller may have sent it at the moment that we gave up.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    connection.settimeout(None)
    try:
        connection.sendall(b"+")
        _, received, _, _ = socket.recv_fds(connection, 1, MOST_DESCRIPTORS)
    except (BrokenPipeError, ConnectionResetError):
        return False
    if len(received) < 2:
        return False
    output, *listeners = received
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    connection.detach()
    # First out of the way, lest one's number were the place of another.
    after = FIRST_LISTENER + len(listeners)
    for place, listener in enumerate([fcntl(one, F_DUPFD, after) for one in listeners], FIRST_LISTENER):
        os.dup2(listener, place)
    os.closerange(after, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    return True
