"""Templates: guests that were booted once and saved; a clone maps the memory privately and shares its pages.

    <template_path>/           a tmpfs, 0700; locked (flock) by the one who makes a template, or clears them
        <fingerprint>/         memory  state  template.json (what it was made of, and how long that took)
        .new-…/                one that is being made, or whose maker or remover was killed
        failed                 when and why the last making failed, for those who waited for it

A fingerprint covers all that a saved state depends on, so a template is never checked: what changes has
another name, and the old one is cleared by the maker of the next.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import orjson

from kata_shim import __version__, log
from kata_shim.errors import ShimError
from kata_shim.factory import tmpfs
from kata_shim.factory.copying import copied
from kata_shim.qemu import cmdline
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.monitor import run_to_end
from kata_shim.qemu.process import kill_by_log
from kata_shim.vm import rehearsal
from kata_shim.vm.machine import Saved

MOST = 4  # templates kept: each holds what its guest touched, about 100 MiB
MIB = 1 << 20
CLEAR_TIMEOUT = 10.0  # seconds that clearing waits for a maker
_MAKING = ".new-"
_INFORMATION = "template.json"
_FAILED = "failed"
_NAME = re.compile(r"[0-9a-f]{32}")
_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC
_FILES = ("memory", "state", _INFORMATION)

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
    # What is done in the guest before it is saved is part of what is saved.
    used = (spec.path, spec.kernel, spec.initrd, spec.firmware, rehearsal.__file__)
    files = {path: _mark(path) for path in used if path}
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
    """The templates in one directory; what else is in there is let alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @asynccontextmanager
    async def open(self, identity: Identity, *, shared: bool) -> AsyncIterator[Saved | None]:
        """Open the template of this identity for a clone; None when there is none.

        The open files stay valid whatever becomes of the directory. For a `shared` clone the memory is a copy
        of its own. Raises ShimError, `permission-denied` when somebody else could have put it there, and
        `aborted` when a boot is faster than the copy.
        """
        with ExitStack() as closing:
            with self._in_words():
                saved = self._open(identity, closing, shared=shared)
                if saved is not None and shared:
                    boot = _seconds_to_boot(self.path / identity.fingerprint)
                    memory = await run_to_end(asyncio.to_thread(copied, saved.memory, boot))
                    closing.callback(os.close, memory)
                    saved = saved._replace(memory=memory)
            yield saved

    def _open(self, identity: Identity, closing: ExitStack, *, shared: bool) -> Saved | None:
        try:
            directory = self._open_directory(closing)
            template = os.open(identity.fingerprint, os.O_DIRECTORY | _SAFELY, dir_fd=directory)
            closing.callback(os.close, template)
            memory = os.open("memory", os.O_RDWR | _SAFELY, dir_fd=template)
            closing.callback(os.close, memory)
            state = os.open("state", os.O_RDONLY | _SAFELY, dir_fd=template)
            closing.callback(os.close, state)
        except FileNotFoundError:
            return None
        os.utime(template)  # the least lately used are cleared first
        return Saved(memory, state, shared)

    def discard(self, identity: Identity, saved: Saved) -> None:
        """Remove a template that turned out to be useless, unless another has been made in its place."""
        template = self.path / identity.fingerprint
        with suppress(OSError):
            if os.path.samestat(os.fstat(saved.state), os.stat(template / "state")):
                self._remove(template)

    async def make(self, identity: Identity, memory: int, make: Make, *, wait: float) -> bool:
        """Have `make` fill a directory with `memory` (of that many MiB) and `state`; False: another does.

        One at a time: the others wait so many seconds for its end, and find the template made. Raises
        ShimError when it fails, also for those who waited meanwhile, and `deadline-exceeded` after `wait`.
        """
        began = time.monotonic()
        template = self.path / identity.fingerprint
        with self._in_words():
            os.makedirs(self.path, 0o700, exist_ok=True)
            async with self._locked(wait) as locked:
                if not locked:
                    return False
                if all((template / name).exists() for name in _FILES):
                    return True
                self._hear_failure(began)
                await self._clear_unfinished()
                self._remove(template)
                try:
                    await self._make(identity, memory, make)
                except (ShimError, OSError) as error:
                    self._tell_failure(str(error))
                    raise
                self._clear_outdated()
        return True

    def listed(self) -> list[dict[str, object]]:
        """Return the templates, the last used first: fingerprint, bytes in memory, seconds since made."""
        found: list[dict[str, object]] = []
        for path in self._last_used_first():
            with suppress(OSError):
                files = [os.stat(path / name) for name in ("memory", "state")]
                age = round(time.time() - files[1].st_mtime)
                size = sum(file.st_blocks for file in files) * 512  # stat(2)'s unit
                found.append({"fingerprint": path.name, "bytes": size, "seconds": age})
        return found

    async def clear(self) -> None:
        """Remove all templates and what was mounted for them; clones go on. Raises ShimError."""
        with self._in_words(), suppress(FileNotFoundError):
            async with self._locked(CLEAR_TIMEOUT, mount=False):
                await self._clear_unfinished()
                for path in self._last_used_first():
                    self._remove(path)
                (self.path / _FAILED).unlink(missing_ok=True)
                if not os.listdir(self.path):
                    tmpfs.unmount(self.path)

    async def _make(self, identity: Identity, memory: int, make: Make) -> None:
        directory = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.path))
        try:
            (directory / "memory").touch(0o600)
            os.truncate(directory / "memory", memory * MIB)
            began = time.monotonic()
            await make(directory)
            _seal(directory, identity, time.monotonic() - began)
            os.rename(directory, self.path / identity.fingerprint)
        except BaseException:
            shutil.rmtree(directory)
            raise
        (self.path / _FAILED).unlink(missing_ok=True)

    def _hear_failure(self, began: float) -> None:
        """Raise what the maker's making failed of for whom this one has waited, if it has."""
        with suppress(OSError, ValueError, KeyError):
            failed = orjson.loads((self.path / _FAILED).read_bytes())
            if began <= failed["at"] <= time.monotonic():
                raise ShimError("aborted", failed["why"])

    def _tell_failure(self, why: str) -> None:
        with suppress(OSError):
            (self.path / _FAILED).write_bytes(orjson.dumps({"at": time.monotonic(), "why": why}))

    def _open_directory(self, closing: ExitStack) -> int:
        """Open the directory; raises ShimError if anybody else could have written to it, and OSError."""
        directory = -1
        with suppress(NotADirectoryError):
            directory = os.open(self.path, os.O_DIRECTORY | _SAFELY)
            closing.callback(os.close, directory)
        found = os.fstat(directory) if directory >= 0 else None
        if found is None or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            text = "must be a directory of this user's own, mode 0700; correct it, or set another"
            raise ShimError("permission-denied", f"template_path: {self.path} {text}")
        return directory

    @asynccontextmanager
    async def _locked(self, wait: float, *, mount: bool = True) -> AsyncIterator[bool]:
        """Hold the directory's lock, on a tmpfs where it was on a disk, which would write it all back.

        What is locked is what stands at the path: whoever mounts or unmounts there holds the lock before.
        """
        while True:
            with ExitStack() as closing:
                directory = self._open_directory(closing)
                if not await self._flock(directory, wait):
                    yield False
                    return
                if not os.path.samestat(os.fstat(directory), os.stat(self.path)):
                    continue
                if mount and not tmpfs.is_in_memory(self.path):
                    tmpfs.mount(self.path)
                    continue
                yield True
                return

    async def _flock(self, directory: int, wait: float) -> bool:
        """Take the lock; the waiting is a thread's, which ends once the lock has come free."""
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not wait:
                return False
        loop = asyncio.get_running_loop()
        locked = asyncio.Event()

        def take() -> None:
            fcntl.flock(directory, fcntl.LOCK_EX)
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(locked.set)

        threading.Thread(target=take, daemon=True).start()
        try:
            async with asyncio.timeout(wait):
                return await locked.wait()
        except TimeoutError:
            text = f"template_path: {self.path}: another has been making a template for {wait:g} s"
            raise ShimError("deadline-exceeded", text) from None

    async def _clear_unfinished(self) -> None:
        """Remove what those left who were killed; a maker's QEMU died with it, or does now."""
        for directory in self.path.glob(f"{_MAKING}*"):
            await kill_by_log(directory / "qemu.log")
            shutil.rmtree(directory)

    def _clear_outdated(self) -> None:
        """Keep the MOST lately used templates whose files are still the same."""
        for number, path in enumerate(self._last_used_first()):
            if number >= MOST or _is_outdated(path):
                log.info("a template is cleared", name=path.name)
                self._remove(path)

    def _last_used_first(self) -> list[Path]:
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            found = [
                (entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path))
                for entry in entries
                if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
            return [path for _, path in sorted(found, reverse=True)]
        return []

    def _remove(self, template: Path) -> None:
        """Remove a template, of which at no moment a part stands under its name."""
        with suppress(FileNotFoundError):
            gone = template.with_name(f"{_MAKING}{uuid4().hex}")
            os.rename(template, gone)
            shutil.rmtree(gone)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Turn what the file system refuses into a ShimError that names the place."""
        try:
            yield
        except OSError as error:
            where = error.filename or self.path
            raise ShimError("failed-precondition", f"template_path: {where}: {error.strerror}") from None


def _seal(directory: Path, identity: Identity, seconds: float) -> None:
    """Keep the template's own files, and say what it was made of and how long that took."""
    for entry in list(directory.iterdir()):
        if entry.is_dir():
            entry.rmdir()
        elif entry.name not in ("memory", "state"):
            entry.unlink()
    information = {"files": identity.files, "seconds": round(seconds, 3)}
    (directory / _INFORMATION).write_bytes(orjson.dumps(information))


def _seconds_to_boot(directory: Path) -> float:
    """Return how long it took to boot the template; no time at all where that cannot be read."""
    try:
        return float(orjson.loads((directory / _INFORMATION).read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _is_outdated(directory: Path) -> bool:
    try:
        files = orjson.loads((directory / _INFORMATION).read_bytes())["files"]
        return any(_mark(path) != mark for path, mark in files.items())
    except (OSError, ShimError, ValueError, KeyError):
        return True
