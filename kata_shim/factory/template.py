"""Templates: guests that were booted once and saved; a clone maps the memory privately and shares its pages.

    <template_path>/           a tmpfs, 0700
        lock                   held by the one who makes a template, or clears them
        <fingerprint>/         memory  state  template.json (what it was made of, for those who clear)
        .new-…/                one that is being made, or whose maker was killed

A fingerprint covers all that a saved state depends on, so a template is never checked: what changes has
another name, and the old one is cleared by the maker of the next.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from kata_shim import __version__, log
from kata_shim.errors import ShimError
from kata_shim.factory import tmpfs
from kata_shim.qemu import cmdline
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.process import kill_by_log
from kata_shim.vm.machine import Saved

MOST = 4  # templates kept: each holds what its guest touched, about 100 MiB
MIB = 1 << 20
_MAKING = ".new-"
_INFORMATION = "template.json"
_FAILED = "failed"

Make = Callable[[Path], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a template is made of: `fingerprint` of everything, and each file's own mark."""

    fingerprint: str
    files: dict[str, list[int]]


def identify(spec: MachineSpec) -> Identity:
    """Return the identity of the template that a machine of this description can be cloned from.

    Raises ShimError `failed-precondition` for a file that is not there.
    """
    files = {path: _mark(path) for path in (spec.path, spec.kernel, spec.initrd, spec.firmware) if path}
    argv = cmdline.build(replace(spec, memory_path="memory", shared_memory=True))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = orjson.dumps([__version__, boot, argv, files])
    return Identity(hashlib.sha256(text).hexdigest()[:32], files)


def _mark(path: str) -> list[int]:
    """What changes when a file does, be it replaced or written to: nobody can set a ctime back."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ShimError("failed-precondition", f"{path}: {error.strerror}") from None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


class Templates:
    """The templates in one directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def open(self, identity: Identity, *, shared: bool) -> AsyncIterator[Saved | None]:
        """Open the template of this identity for a clone; None when there is none.

        The open files stay valid whatever becomes of the directory. For a `shared` clone the memory is a copy
        of its own. Raises ShimError `permission-denied` when somebody else could have put it there.
        """
        with ExitStack() as closing:
            memory, state = self._open(identity, closing)
            if shared and memory >= 0:
                began = time.monotonic()
                memory = await asyncio.to_thread(_copy, memory)
                closing.callback(os.close, memory)
                log.info("the template's memory is copied", seconds=round(time.monotonic() - began, 3))
            yield Saved(memory, state, shared) if memory >= 0 else None

    def _open(self, identity: Identity, closing: ExitStack) -> tuple[int, int]:
        if not self._is_ours():
            return -1, -1
        directory = self.path / identity.fingerprint
        try:
            memory = os.open(directory / "memory", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            closing.callback(os.close, memory)
            state = os.open(directory / "state", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            closing.callback(os.close, state)
            os.utime(directory)  # the least lately used are cleared first
        except FileNotFoundError:
            return -1, -1
        return memory, state

    def discard(self, identity: Identity) -> None:
        """Remove a template that turned out to be useless, so that the next start makes a new one."""
        shutil.rmtree(self.path / identity.fingerprint, ignore_errors=True)

    async def make(self, identity: Identity, memory: int, make: Make, *, wait: bool) -> bool:
        """Have `make` fill a directory with `memory` (of that many MiB) and `state`; False: another does.

        One at a time: with `wait` the others wait for its end, and find the template made. Raises ShimError
        when it fails, and for those who waited meanwhile.
        """
        self._prepare()
        began = time.time()
        async with self._locked(wait=wait) as locked:
            if not locked:
                return False
            if (self.path / identity.fingerprint).exists():
                return True
            with suppress(FileNotFoundError):
                if os.stat(self.path / _FAILED).st_mtime >= began:
                    raise ShimError("aborted", (self.path / _FAILED).read_text())
            await self._clear_unfinished()
            try:
                await self._make(identity, memory, make)
            except (ShimError, OSError) as error:
                (self.path / _FAILED).write_text(str(error))
                raise
            self._clear_outdated()
        return True

    def listed(self) -> list[dict[str, object]]:
        """Return the templates, the last used first: fingerprint, bytes in memory, seconds since made."""
        found = []
        with suppress(FileNotFoundError):
            whole = self.path.glob("[!.]*/")
            for path in sorted(whole, key=lambda path: path.stat().st_mtime, reverse=True):
                with suppress(FileNotFoundError, NotADirectoryError):
                    files = [os.stat(path / name) for name in ("memory", "state")]
                    age = round(time.time() - files[1].st_mtime)
                    size = sum(file.st_blocks for file in files) * 512  # stat(2)'s unit
                    found.append({"fingerprint": path.name, "bytes": size, "seconds": age})
        return found

    async def clear(self) -> None:
        """Remove all templates and what was mounted for them; clones go on."""
        if not self._is_ours():
            return
        async with self._locked(wait=True):
            await self._clear_unfinished()
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        tmpfs.unmount(self.path)

    async def _make(self, identity: Identity, memory: int, make: Make) -> None:
        directory = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.path))
        try:
            (directory / "memory").touch(0o600)
            os.truncate(directory / "memory", memory * MIB)
            await make(directory)
            _seal(directory, identity)
            os.rename(directory, self.path / identity.fingerprint)
        except BaseException:
            shutil.rmtree(directory)
            raise

    def _prepare(self) -> None:
        """See that there is a directory of ours on a tmpfs; a disk's would be written back for ever."""
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            if self._is_ours() and not tmpfs.is_in_memory(self.path):
                tmpfs.mount(self.path)
        except OSError as error:
            raise ShimError("failed-precondition", f"template_path: {self.path}: {error.strerror}") from None

    def _is_ours(self) -> bool:
        """Whether the directory is there; raises ShimError if anybody else could have written to it."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ShimError("failed-precondition", f"template_path: {self.path}: {error.strerror}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            text = "must be a directory of this user's own, mode 0700; correct it, or set another"
            raise ShimError("permission-denied", f"template_path: {self.path} {text}")
        return True

    @asynccontextmanager
    async def _locked(self, *, wait: bool) -> AsyncIterator[bool]:
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield await _flock(lock, wait=wait)
        finally:
            os.close(lock)

    async def _clear_unfinished(self) -> None:
        """Remove what makers left who were killed; their QEMU died with them, or does now."""
        for directory in self.path.glob(f"{_MAKING}*"):
            await kill_by_log(directory / "qemu.log")
            shutil.rmtree(directory)

    def _clear_outdated(self) -> None:
        """Keep the MOST lately used templates whose files are still the same."""
        with os.scandir(self.path) as entries:
            found = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for number, path in enumerate(found):
            if number >= MOST or _is_outdated(path):
                log.info("a template is cleared", name=path.name)
                shutil.rmtree(path)


def _seal(directory: Path, identity: Identity) -> None:
    """Keep the template's own files, and say what it was made of."""
    for entry in list(directory.iterdir()):
        if entry.name not in ("memory", "state"):
            entry.unlink()
    (directory / _INFORMATION).write_bytes(orjson.dumps({"files": identity.files}))


def _is_outdated(directory: Path) -> bool:
    try:
        files = orjson.loads((directory / _INFORMATION).read_bytes())["files"]
        return any(_mark(path) != mark for path, mark in files.items())
    except (OSError, ShimError, ValueError, KeyError):
        return True


async def _flock(file: int, *, wait: bool) -> bool:
    """Take an exclusive lock; the waiting is a thread's, which ends by itself once `file` is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        if not wait:
            return False
    loop = asyncio.get_running_loop()
    locked = loop.create_future()

    def tell() -> None:
        if not locked.done():
            locked.set_result(True)

    def take() -> None:
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=take, daemon=True).start()
    return bool(await locked)


def _copy(memory: int) -> int:
    """Return a memfd with the same content, holes left out."""
    size = os.fstat(memory).st_size
    copy = os.memfd_create("kata-shim-clone", os.MFD_CLOEXEC)
    try:
        os.truncate(copy, size)
        for begin, end in _extents(memory):
            os.lseek(copy, begin, os.SEEK_SET)
            while begin < end:
                begin += os.sendfile(copy, memory, begin, end - begin)
        return copy
    except BaseException:
        os.close(copy)
        raise


def _extents(file: int) -> Iterator[tuple[int, int]]:
    """Yield where a sparse file has data."""
    end = 0
    while True:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more
                return
            raise
        end = os.lseek(file, begin, os.SEEK_HOLE)
        yield begin, end
