"""<root>/factory: what one factory owns, and the lock that makes it the only one of its root.

    lock            held by the factory while it lives; in it, who that is (Home.note)
    vms/<uuid>/     one waiting VM each: qmp.sock  console.sock  agent.sock  qemu.log
    ended/          what `vms` becomes when all are to be ended: nobody can take one any more
    zygote.sock     where shims are forked

Where a VM's qemu.log lies decides whose VM it is: a factory and `factory destroy` end every QEMU that writes
to one in here. A taker moves a VM's whole directory into its sandbox's by one rename(2), so at no moment is
it nobody's or two parties', whoever is killed when.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

import orjson

from kata_shim.qemu.process import kill_by_log, read_start_time
from kata_shim.qemu.virtiofsd import LOG as FILES_LOG
from kata_shim.registry import check_root
from kata_shim.vm import shared


class Home:
    """The directory of the factory of one root of state."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "factory"
        self.vms = self.path / "vms"
        self._ended = self.path / "ended"
        self.zygote = self.path / "zygote.sock"
        self._lock = -1

    def take(self) -> bool:
        """Make the directory ours until `clear` or our end; False while a factory lives that has it.

        Raises ShimError for a root that others may write to.
        """
        while True:
            os.makedirs(self.root, 0o700, exist_ok=True)
            check_root(str(self.root))
            with suppress(FileExistsError):
                self.path.mkdir(0o700)
            try:
                lock = os.open(
                    self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
            except FileNotFoundError:
                continue  # who had it has just cleared it
            if self._is_locked(lock):
                self._lock = lock
                return True
            os.close(lock)
            if self.is_taken():
                return False

    def is_taken(self) -> bool:
        """Tell whether a factory has the directory now."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def _is_locked(self, lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have cleared the directory in between.
            return os.path.samestat(os.fstat(lock), os.stat(self.path / "lock"))
        except (BlockingIOError, FileNotFoundError):
            return False

    def note(self, pid: int, endpoint: Path) -> None:
        """Write into the lock, in one piece, who holds it."""
        text = orjson.dumps({"pid": pid, "start_time": read_start_time(pid), "endpoint": str(endpoint)})
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))

    def noted(self) -> dict[str, object]:
        """Return what the last who held the lock wrote; {} where nothing is to be read."""
        try:
            found = orjson.loads((self.path / "lock").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    async def sweep(self) -> int:
        """End every VM in here and remove what is left of it; return how many QEMUs that were."""
        killed = await self._end()  # those of a sweep that was cut short
        with suppress(FileNotFoundError):
            self.vms.rename(self._ended)
        return killed + await self._end()

    async def _end(self) -> int:
        try:
            directories = list(self._ended.iterdir())
        except FileNotFoundError:
            return 0
        killed = await kill_by_log(*(directory / "qemu.log" for directory in directories))
        served = [log for directory in directories if (log := directory / FILES_LOG).exists()]
        if served:  # by who ends with those QEMUs, if it had heard of them
            await kill_by_log(*served)
        shared.release(self._ended)
        shutil.rmtree(self._ended)
        return killed

    async def clear(self) -> int:
        """Sweep, remove the directory, and give it up."""
        killed = await self.sweep()
        for path in (self.zygote, self.path / "lock"):
            path.unlink(missing_ok=True)
        os.rmdir(self.path)
        os.close(self._lock)
        self._lock = -1
        return killed
