"""vm_cache_endpoint: where a factory hands VMs out, bound in a dead one's place, and asked by shims."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from kata_shim.errors import ShimError

TIMEOUT = 3.0  # seconds: a factory that stands still must not hold up a start for longer

Answer = Callable[[], Awaitable[Any]]


async def bind(path: Path) -> socket.socket:
    """Return a socket listening at `path`, 0600, its directory made 0700 if there is none.

    What a dead factory left there is replaced. Raises ShimError `already-exists` where a factory lives, or
    something else is, which is not touched.
    """
    try:
        os.makedirs(path.parent, 0o700, exist_ok=True)
        with _alone(path):
            await _clear_dead(path)
            return listen(path)
    except OSError as error:
        where = error.filename or path
        raise ShimError("failed-precondition", f"vm_cache_endpoint: {where}: {error.strerror}") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep two that start from replacing each other's socket.

    The lock is a file of ours, for anybody who may read a directory may lock that.
    Raises ShimError `already-exists` where another starts just now.
    """
    name = f"{path}.lock"
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock), os.lstat(name))  # else who had it has just removed it
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ShimError(
                "already-exists",
                f"vm_cache_endpoint: {path}: another factory starts there just now; set another path",
            )
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)
    finally:
        os.close(lock)


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at `path`, where nothing may be, mode 0600. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


async def _clear_dead(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ShimError(
            "already-exists", f"vm_cache_endpoint: {path} exists and is no socket; remove it, or set another"
        )
    who = "another program"
    try:
        async with ask(path, "factory.status") as answer:
            status = await answer()
            who = f"the factory of {status['root']} (pid {status['pid']})"
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except (ShimError, KeyError, TypeError):
        pass
    raise ShimError(
        "already-exists", f"vm_cache_endpoint: {path}: {who} serves there; destroy it, or set another path"
    )


def remove_dead(path: Path) -> None:
    """Remove what a factory that has ended left, its lock too; a socket that is served, or will be, stays."""
    with (
        suppress(FileNotFoundError, ShimError),
        _alone(path),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
    ):
        probe.settimeout(TIMEOUT)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        except OSError:
            return


@asynccontextmanager
async def ask(path: Path, method: str, params: object = None) -> AsyncIterator[Answer]:
    """Call `method` and yield what waits for its next answer, of any kind; the call ends with the body.

    Raises, as the waiting does, the factory's own ShimError, `unavailable` for one that says nothing within
    TIMEOUT seconds or not in the protocol; OSError where nobody listens.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        _check_peer(path, writer.get_extra_info("socket"))
        writer.write(orjson.dumps({"id": 1, "method": method, "params": params}) + b"\n")
        yield partial(_answer, path, reader)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _check_peer(path: Path, peer: socket.socket) -> None:
    _, uid, _ = struct.unpack("=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in (0, os.geteuid()):
        raise ShimError("permission-denied", f"vm_cache_endpoint: {path} is served by uid {uid}")


async def _answer(path: Path, reader: asyncio.StreamReader) -> Any:
    try:
        async with asyncio.timeout(TIMEOUT):
            line = await reader.readline()
        answer = orjson.loads(line)
        if error := answer.get("error"):
            raise ShimError(error["code"], error["message"])
        return answer["progress"] if "progress" in answer else answer["result"]
    except TimeoutError:
        why = f"does not answer within {TIMEOUT:g} s"
    except OSError as error:
        why = f"broke off: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        why = "broke off, or is no factory"
    raise ShimError("unavailable", f"vm_cache_endpoint: {path}: the factory {why}")
