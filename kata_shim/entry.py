"""containerd-shim-kata-v2 as containerd calls it: `start`, `delete` and `-info`; all else is kata_shim.shim.

The interface is containerd's runtime v2 (core/runtime/v2/README.md of github.com/containerd/containerd):
`start` prints the address at which the shim answers and ends; `delete` prints a serialized DeleteResponse.
Standard library only, and little of it: containerd waits.
"""

from __future__ import annotations

import os
import sys
from _socket import AF_UNIX, SOCK_STREAM, socket

from kata_shim import registry, shims
from kata_shim.errors import ShimError, invalid

SOCKETS = "/run/containerd/s"  # where containerd's own shims have theirs
RUNTIME = "io.containerd.kata.v2"
KILLED = 137  # the exit status of what a shim that died has left
SILENCE = 1.0  # seconds until a shim is asked whether it lives, and as many to answer; we have 5 in all
SIGNATURE = "tasks"  # the file of a sandbox that is containerd's: where its task socket is
CONFIG_MOST = 4 << 20  # bytes of a config.json
STDIN_MOST = 4 << 20  # bytes of what containerd gives us to read
_OURS = ("serve", "check", "zygote", "factory")
_SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
_CONTAINER_TYPE = "io.kubernetes.cri.container-type"
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process and end it."""
    words = sys.argv[1:]
    if not words or words[0] in _OURS:
        from kata_shim.shim import main as shim

        sys.exit(shim())
    status = 1
    try:
        status = _run(words)
    except ShimError as error:
        print(f"containerd-shim-kata-v2: {error.message}", file=sys.stderr)
    except OSError as error:
        print(f"containerd-shim-kata-v2: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    # containerd waits. Nothing is buffered, and nothing to be torn down that would be worth its time.
    os._exit(status)


def _run(words: list[str]) -> int:
    flags, commands = _parse(words)
    match commands:
        case ["start"]:
            return _start(flags)
        case ["delete"]:
            return _delete(flags)
        case [] if "info" in flags:
            os.write(1, _runtime_info())
            return 0
        case [] if "version" in flags or "v" in flags:
            from kata_shim import __version__

            os.write(1, f"containerd-shim-kata-v2 {__version__}\n".encode())
            return 0
    raise invalid(f"command line: {' '.join(words)[:200]}: neither start nor delete")


def _parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return flags and commands, as Go's flag package reads them: -name value, -name=value, --name."""
    flags, commands, rest = {}, [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            commands.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals and name not in ("debug", "v", "version", "info") and rest:
            value = rest.pop(0)
        flags[name] = value
    return flags, commands


def _start(flags: dict[str, str]) -> int:
    """Start the shim of a sandbox, or find that of a container's sandbox; print its address."""
    container_id, sandbox_id = flags.get("id", ""), _sandbox_of(".", flags.get("id", ""))
    asked = _bootstrap_id(_read_stdin()) if container_id else ""
    path = _socket_path(flags, sandbox_id)
    if sandbox_id != container_id:
        _require_listening(path, sandbox_id)
    else:
        _start_sandbox(flags, sandbox_id, path)
    _tell(path, as_json=bool(asked) and asked == container_id.encode())
    return 0


def _start_sandbox(flags: dict[str, str], sandbox_id: str, path: str) -> None:
    from kata_shim.spawn import Containerd

    root = _root()
    _bury(root, sandbox_id, path)
    registry.claim(root, sandbox_id)
    try:
        _sign(root, sandbox_id, path)
        listener = _listen(path)
        events = os.environ.get("TTRPC_ADDRESS") or flags.get("address", "") + ".ttrpc"
        containerd = Containerd(listener.fileno(), flags.get("namespace", ""), events)
        shims.connect(root, sandbox_id, containerd=containerd).close()
    except BaseException:
        registry.remove(root, sandbox_id)
        raise
    listener.close()


def _sign(root: str, sandbox_id: str, path: str) -> None:
    """Note whose a sandbox is: that containerd's, and that namespace's, whose tasks are at `path`."""
    with open(f"{registry.sandbox_directory(root, sandbox_id)}/{SIGNATURE}", "w") as file:
        file.write(path)


def _is_signed(root: str, sandbox_id: str, path: str) -> bool:
    """Whether there is such a sandbox and it is that one's, or nobody's: not kata-runtime's, or another's."""
    directory = registry.sandbox_directory(root, sandbox_id)
    try:
        with open(f"{directory}/{SIGNATURE}") as file:
            return file.read() in (path, "")
    except FileNotFoundError:
        return os.path.isdir(directory) and not os.path.lexists(f"{directory}/record.json")


def _bury(root: str, sandbox_id: str, path: str) -> None:
    """Clear what is left of a shim that died before containerd knew of it; the socket tells it was its."""
    if not registry.is_id(sandbox_id) or not os.path.lexists(path) or _answers(path):
        return
    if _is_signed(root, sandbox_id, path):
        from kata_shim.cli import silent

        silent.clear(root, sandbox_id, SILENCE)


def _delete(flags: dict[str, str]) -> int:
    """Clear what is left of a sandbox whose shim has died; a container that is not one leaves nothing."""
    container_id, bundle = flags.get("id", ""), flags.get("bundle") or "."
    sandbox_id = _sandbox_of(bundle, container_id)
    if sandbox_id == container_id:
        from kata_shim.cli import silent

        root = _root()
        path = _socket_path(flags, sandbox_id)
        if registry.is_id(container_id) and _is_signed(root, container_id, path):
            silent.clear(root, container_id, SILENCE)
        # A shim whose sandbox has gone may still answer for a moment, until it has ended.
        if not os.path.lexists(registry.sandbox_directory(root, container_id)) or not _answers(path):
            _unlink(path)
    _answer_deleted()
    return 0


def _answer_deleted() -> None:
    """Write a DeleteResponse: field 2 the status, field 3 the time as a Timestamp's seconds."""
    import time

    moment = b"\x08" + _varint(int(time.time()))
    os.write(1, b"\x10" + _varint(KILLED) + _bytes_field(3, moment))


def _runtime_info() -> bytes:
    """Return a containerd.types.RuntimeInfo: field 1 our name, field 2.1 our version."""
    from kata_shim import __version__

    return _bytes_field(1, RUNTIME.encode()) + _bytes_field(2, _bytes_field(1, __version__.encode()))


def _bootstrap_id(data: bytes) -> bytes:
    """Return field 1 of the BootstrapParams that containerd writes to `start` from 2.3 on; b"" without."""
    length = data[1] if data[:1] == b"\x0a" and len(data) > 1 else 0
    return data[2 : 2 + length] if 0 < length < 0x80 else b""  # an id is no longer


def _read_stdin() -> bytes:
    """Return what there is on a pipe or file; nothing where it is closed, a terminal or a device."""
    from stat import S_ISFIFO, S_ISREG, S_ISSOCK

    data = b""
    try:
        mode = os.fstat(0).st_mode
        if not (S_ISFIFO(mode) or S_ISREG(mode) or S_ISSOCK(mode)):
            return b""
        while len(data) < STDIN_MOST and (more := os.read(0, 65536)):
            data += more
    except OSError:
        pass  # it is closed, or never was open
    return data


def _bytes_field(number: int, value: bytes) -> bytes:
    """Return a field of protobuf's wire format that has bytes."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def _sandbox_of(bundle: str, container_id: str) -> str:
    """Return the sandbox that a bundle's container belongs to, by CRI's annotations; else its own id."""
    try:
        config = _read_config(f"{bundle}/config.json")
        if _SANDBOX_ID.encode() not in config:
            return container_id
        import json  # which takes as long as the interpreter's own start

        annotations = json.loads(config).get("annotations") or {}
        if annotations.get(_CONTAINER_TYPE) == "container":
            return str(annotations[_SANDBOX_ID])
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        pass  # of a bundle that is broken, Create tells what is wrong; delete must clear it all the same
    return container_id


def _read_config(path: str) -> bytes:
    """Return what a bundle's file says; no link, and without waiting for what a FIFO's other end may say."""
    from stat import S_ISREG

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode) or status.st_size > CONFIG_MOST:
            return b""
        return os.read(descriptor, CONFIG_MOST)
    finally:
        os.close(descriptor)


def _socket_path(flags: dict[str, str], sandbox_id: str) -> str:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # CPython 3.11's own; hashlib loads OpenSSL
    except ImportError:
        from hashlib import sha256

    key = f"{flags.get('address', '')}/{flags.get('namespace', '')}/{sandbox_id}"
    return f"{SOCKETS}/{sha256(key.encode()).hexdigest()}"


def _listen(path: str) -> socket:
    """Return a socket listening at `path`, mode 0600, in the place of one at which nobody answers."""
    os.makedirs(SOCKETS, 0o711, exist_ok=True)
    listener = socket(AF_UNIX, SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        if os.path.lexists(path):
            if _answers(path):
                raise ShimError("already-exists", f"{path}: another shim answers there")
            _unlink(path)
        listener.bind(path)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def _unlink(path: str) -> None:
    try:  # noqa: SIM105  contextlib is slow to import
        os.unlink(path)
    except FileNotFoundError:
        pass  # a shim that ends has done so


def _require_listening(path: str, sandbox_id: str) -> None:
    if not _answers(path):
        raise ShimError("unavailable", f"sandbox {sandbox_id}: no shim of it is running")


def _answers(path: str) -> bool:
    with_peer = socket(AF_UNIX, SOCK_STREAM)
    try:
        with_peer.connect(path)
    except OSError:
        return False
    finally:
        with_peer.close()
    return True


def _tell(path: str, *, as_json: bool) -> None:
    """Print the address; as JSON for a containerd that reads so, and then speaks version 3 of the service."""
    address = f"unix://{path}"
    with open(".address", "w") as file:
        file.write(address)
    os.rename(".address", "address")
    # What needs escaping in JSON is in no path of ours.
    words = f'{{"version":3,"address":"{address}","protocol":"ttrpc"}}' if as_json else address
    os.write(1, words.encode())


def _root() -> str:
    return os.environ.get("KATA_SHIM_ROOT") or registry.DEFAULT_ROOT


if __name__ == "__main__":
    main()
