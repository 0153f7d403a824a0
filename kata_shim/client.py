"""Calls to a sandbox's shim over its socket: blocking, standard library only, quick to import.

A caller lives for milliseconds, so what costs more than a millisecond to import (json, socket with its enums)
is imported only where it is needed. The protocol is the one of kata_shim/messages.py, which needs orjson and
is therefore not used here.

    <root>/sandboxes/<id>/   shim.sock  the shim listens here          lock      taken by who starts a shim
                             shim.log   its stdout and stderr          record.json   what the sandbox owns
    <root>/containers/<id>   a link to the sandbox of a container that has not its sandbox's own id
    <root>/factory/          zygote.sock   where a process listens, if the factory runs, that forks shims
"""

from __future__ import annotations

import os

# json and socket.py take as long to import as a bare interpreter takes to start.
from _json import scanstring
from _signal import (  # type: ignore[import-not-found]  # typeshed has only signal.py
    SIGINT,
    SIGTERM,
    default_int_handler,
    getsignal,
    set_wakeup_fd,
    signal,
)
from _socket import AF_UNIX, SOCK_STREAM, socket
from select import POLLIN, poll

from kata_shim.errors import CODES, ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kata_shim.spawn import Containerd

MAX_LINE = 4 * 1024 * 1024
MAX_ID = 64
MAX_SUN_PATH = 107
CANCEL_TIMEOUT = 20.0
DEFAULT_ROOT = "/run/kata-shim"

_woken = -1  # see _wake

_ID_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"


def is_id(text: str) -> bool:
    """Tell whether `text` is a sandbox id: 1 to 64 of A-Z a-z 0-9 _ . - and neither "." nor ".."."""
    return 0 < len(text) <= MAX_ID and not text.strip(_ID_CHARACTERS) and text not in (".", "..")


def sandbox_directory(root: str, sandbox_id: str) -> str:
    """Return the directory of a sandbox under the root of state."""
    return f"{root}/sandboxes/{sandbox_id}"


def check_root(root: str) -> bool:
    """Return whether the root of state exists; raises ShimError if someone else could have written to it."""
    try:
        status = os.stat(root)
    except FileNotFoundError:
        return False
    if status.st_uid != os.geteuid():
        raise ShimError("permission-denied", f"{root}: belongs to uid {status.st_uid}, not to the caller's")
    if status.st_mode & 0o022:
        mode = status.st_mode & 0o7777
        raise ShimError("permission-denied", f"{root}: mode {mode:o} lets group or others write into it")
    return True


def list_ids(root: str) -> list[str]:
    """Return the ids of all sandboxes, sorted. Raises ShimError as `check_root` does."""
    if not check_root(root):
        return []
    try:
        names = os.listdir(f"{root}/sandboxes")
    except FileNotFoundError:
        return []
    return sorted(name for name in names if is_id(name))


def claim(root: str, sandbox_id: str) -> os.stat_result:
    """Make the directory of a new sandbox, mode 0700, which makes the id the caller's; return what it is.

    Raises ShimError: `invalid-argument` for what is no id, `already-exists` where another has it.
    """
    if not is_id(sandbox_id):
        rule = f"1 to {MAX_ID} of A-Z a-z 0-9 _ . - (and . and .. are none)"
        raise ShimError("invalid-argument", f"id: {sandbox_id} is not {rule}")
    os.makedirs(root, 0o700, exist_ok=True)
    check_root(root)
    os.makedirs(f"{root}/sandboxes", 0o700, exist_ok=True)
    try:
        os.mkdir(sandbox_directory(root, sandbox_id), 0o700)
    except FileExistsError:
        raise ShimError("already-exists", f"id: {sandbox_id} is in use") from None
    return os.stat(sandbox_directory(root, sandbox_id))


def remove(root: str, sandbox_id: str) -> None:
    """Remove the directory of a sandbox that owns nothing: no shim has written a record for it.

    Raises ShimError `failed-precondition` where there is a record, since only a shim can clear what it lists,
    and where something is mounted below it.
    """
    directory = sandbox_directory(root, sandbox_id)
    if os.path.lexists(f"{directory}/record.json"):
        raise ShimError("failed-precondition", f"{sandbox_id} still owns what {directory}/record.json lists")
    from kata_shim.removal import remove_tree

    try:
        remove_tree(directory)
    except OSError as error:
        where = error.filename or directory
        raise ShimError("failed-precondition", f"{sandbox_id}: {where}: {error.strerror}") from None


def resolve(root: str, prefix: str) -> str:
    """Return the id of the sandbox that `prefix` means, by its own id or by that of a container in it.

    Raises ShimError as `resolve_container`.
    """
    return resolve_container(root, prefix)[0]


def resolve_container(root: str, prefix: str) -> tuple[str, str]:
    """Return a sandbox's id, and the id of a container in it, "" if it is the sandbox that is meant.

    `prefix` is an id, or else the beginning of only one. Raises ShimError in the words of the documented
    system: `Missing container ID`, `no such container ID (x)` and `multiple containers found (x)`.
    """
    if not prefix:
        raise ShimError("invalid-argument", "Missing container ID")
    if is_id(prefix) and check_root(root) and os.path.isdir(sandbox_directory(root, prefix)):
        return prefix, ""
    containers = _list_containers(root)
    if prefix in containers:
        return containers[prefix], prefix
    found = [(name, "") for name in list_ids(root) if name.startswith(prefix)]
    found += [(sandbox, name) for name, sandbox in containers.items() if name.startswith(prefix)]
    if not found:
        raise ShimError("not-found", f"no such container ID ({prefix})")
    if len(found) > 1:
        raise ShimError("failed-precondition", f"multiple containers found ({prefix})")
    return found[0]


def _list_containers(root: str) -> dict[str, str]:
    """Return the containers that have not their sandbox's own id: id -> the sandbox's."""
    found = {}
    directory = f"{root}/containers"
    if check_root(root) and os.path.isdir(directory):
        for name in os.listdir(directory):
            try:
                sandbox = os.path.basename(os.readlink(f"{directory}/{name}"))
            except FileNotFoundError:
                continue  # it has just been given back
            if os.path.isdir(sandbox_directory(root, sandbox)):
                found[name] = sandbox
    return found


class CancelledError(ShimError):
    """A call that the caller interrupted, and that ended in an error."""


class Connection:
    """A connection to a shim, for one call after another.

    `warn` is called with every warning that an answer carries, before the call returns or raises.
    """

    def __init__(self, sock: socket, directory: str, warn: Callable[[str], None] | None = None) -> None:
        self.socket = sock
        self.directory = directory
        self.warn = warn
        self._last_id = 0
        self._buffer = bytearray()

    def call(self, method: str, params: bytes = b"", progress: Callable[[Any], None] | None = None) -> bytes:
        """Call `method` and return the result as the JSON text that the shim sent.

        `params` is JSON text without a raw newline; `progress` gets the value of each progress answer. Raises
        ShimError: the shim's own error, or `unavailable` when the shim ended first. KeyboardInterrupt cancels
        the call in the shim and waits (at most CANCEL_TIMEOUT s) for how it ended: its result is returned,
        its error raised as CancelledError. A second KeyboardInterrupt is passed on at once.
        """
        call_id, request = self.request(method, params)
        self.send(request)
        with _Interruptible():
            try:
                return self.answer(call_id, progress)
            except KeyboardInterrupt:
                self.send(cancellation(call_id))
        self.socket.settimeout(CANCEL_TIMEOUT)
        try:
            return self.answer(call_id, progress)
        except TimeoutError:
            message = f"cancelled, but the shim did not say how it ended within {CANCEL_TIMEOUT:g} s"
            raise CancelledError("cancelled", message) from None
        except ShimError as error:
            raise CancelledError(error.code, error.message, **error.attrs) from None

    def request(self, method: str, params: bytes = b"") -> tuple[int, bytes]:
        """Return the id and the line of a new request; raises ShimError if the line would be too long."""
        self._last_id += 1
        tail = b',"params":' + params if params else b""
        line = b'{"id":%d,"method":"%s"%s}\n' % (self._last_id, method.encode(), tail)
        if len(line) > MAX_LINE:
            raise ShimError("invalid-argument", f"{method}: {len(line)} bytes are more than {MAX_LINE}")
        return self._last_id, line

    def send(self, line: bytes) -> None:
        """Send one line whole. Raises ShimError `unavailable` when the shim is gone."""
        try:
            self.socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            raise self.death() from None

    def answer(self, call_id: int, progress: Callable[[Any], None] | None = None) -> bytes:
        """Wait for the end of a request that was sent and return its result. Raises as `call` does."""
        while True:
            self._wait()
            for line in self.receive():
                result = self.judge(line, call_id, progress)
                if result is not None:
                    return result

    def _wait(self) -> None:
        """Wait until there is something to receive; raises TimeoutError after the socket's timeout.

        A signal that came before is heard, too: recv(2) alone would sleep on it.
        """
        data, wake, timeout = self.socket.fileno(), _wake(), self.socket.gettimeout()
        waiting = poll()
        waiting.register(data, POLLIN)
        waiting.register(wake, POLLIN)
        while True:
            ready = dict(waiting.poll(None if timeout is None else timeout * 1000))
            if not ready:
                raise TimeoutError
            if wake in ready and any(getsignal(number) is _leave_to_wait for number in os.read(wake, 64)):
                raise KeyboardInterrupt
            if data in ready:
                return

    def receive(self) -> list[bytes]:
        """Return the next whole lines, without their newlines, waiting for more bytes once; may be empty.

        Raises ShimError: `unavailable` when the shim is gone, `data-loss` for a line over MAX_LINE.
        """
        try:
            chunk = self.socket.recv(256 * 1024)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise self.death()
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            self._buffer += tail
            if len(self._buffer) > MAX_LINE:
                raise ShimError("data-loss", f"the shim's answer is longer than {MAX_LINE} bytes")
            return []
        lines = (bytes(self._buffer) + head).split(b"\n")
        self._buffer[:] = tail
        return lines

    def judge(self, line: bytes, call_id: int, progress: Callable[[Any], None] | None) -> bytes | None:
        """Return the result if `line` ends call `call_id` well, None if it ends nothing; raises its error."""
        # messages.py puts the result last, so that what is between this and the last brace is nothing else.
        prefix = b'{"id":%d,"result":' % call_id
        if line.startswith(prefix) and line.endswith(b"}"):
            return line[len(prefix) : -1]
        if progress is None and line.startswith(b'{"id":%d,"progress":' % call_id):
            return None
        if warned := _split_warned(line, call_id):
            self._warn_of(warned[0])
            return warned[1]
        import json

        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "id" not in answer:
            raise ShimError("data-loss", f"the shim's answer is not of its protocol: {line[:80]!r}")
        # An error without an id is the answer to a line whose id the shim could not read.
        if answer["id"] != call_id and not (answer["id"] is None and "error" in answer):
            return None
        if "progress" in answer:
            if progress is not None:
                progress(answer["progress"])
            return None
        self._warn_of(answer.get("warnings"))
        if "error" in answer:
            raise _error_of(answer["error"])
        if "result" not in answer:
            raise ShimError("data-loss", f"the shim's answer is not of its protocol: {line[:80]!r}")
        # Another implementation's order of keys or spaces: the same value, in our own spelling.
        return json.dumps(answer["result"], ensure_ascii=False, separators=(",", ":")).encode()

    def death(self) -> ShimError:
        """Return the error for a shim that ended before it answered, with the last thing it logged."""
        name = self.directory.rpartition("/")[2]
        last = _last_line(f"{self.directory}/shim.log")
        cause = f"; the last line of its log: {last}" if last else ""
        return ShimError("unavailable", f"the shim of {name} ended before it answered{cause}")

    def close(self) -> None:
        """Close the connection; the shim gives up what it still does for it."""
        self.socket.close()

    def _warn_of(self, warnings: object) -> None:
        if self.warn is not None and isinstance(warnings, list):
            for text in warnings:
                self.warn(str(text))


class _Interruptible:
    """While it is entered, signals raise KeyboardInterrupt where an answer is waited for, and only there.

    Anywhere else it could come between an answer and its reader, who would then wait for a second one.
    """

    def __enter__(self) -> None:
        _wake()  # which must hear from now on
        self._numbers = [number for number in (SIGINT, SIGTERM) if getsignal(number) is default_int_handler]
        for number in self._numbers:
            signal(number, _leave_to_wait)

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            signal(number, default_int_handler)


def _leave_to_wait(*_: object) -> None:
    """Do nothing: `_wake` has heard of the signal."""


def _wake() -> int:
    """Return a descriptor that is readable once a signal has come; for the main thread alone."""
    global _woken
    if _woken < 0:
        _woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        set_wakeup_fd(waking, warn_on_full_buffer=False)
    return _woken


def cancellation(call_id: int) -> bytes:
    """Return the line that gives call `call_id` up."""
    return b'{"id":%d,"cancel":true}\n' % call_id


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
    import contextlib

    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/shim.sock")
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


def _error_of(error: object) -> ShimError:
    if not isinstance(error, dict):
        return ShimError("data-loss", "the shim answered with an error that is not an object")
    code = error.get("code")
    attrs = {key: value for key, value in error.items() if key not in ("code", "message")}
    known = isinstance(code, str) and code in CODES
    return ShimError(str(code) if known else "unknown", str(error.get("message", "no message")), **attrs)


def _split_warned(line: bytes, call_id: int) -> tuple[list[str], bytes] | None:
    """Return warnings and result of an answer that messages.py has written with both, else None."""
    head, separator, result = line.partition(b',"result":')
    prefix = b'{"id":%d,"warnings":[' % call_id
    if not (separator and head.startswith(prefix) and head.endswith(b'"]') and result.endswith(b"}")):
        return None
    warnings, end = [], len(prefix) - 1
    try:
        text = head.decode()
        while text[end] in "[,":
            if text[end + 1] != '"':
                return None
            warning, end = scanstring(text, end + 2)
            warnings.append(warning)
    except (ValueError, IndexError, SystemError):  # as scanstring has it where json was not imported
        return None  # the separator stood in a warning, or this is no JSON
    return (warnings, result[:-1]) if text[end:] == "]" else None


def _last_line(path: str) -> str:
    """Return the last line of a log that is not blank, at most 1000 characters of it; "" if there is none."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            lines = log.read(4096).decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[-1000:] for line in reversed(lines) if line.strip()), "")
