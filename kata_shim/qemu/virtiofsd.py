"""virtiofsd, which serves a machine's shared files to QEMU (vhost-user-fs): started, found again, ended.

It is two processes. The one that we start waits for the one that serves, which is alone in mount, process-id
and network namespaces of its own, with the shared directory for its root; where one ends, so does the other,
and both when QEMU hangs up. The options are QEMU 7.2's own virtiofsd's (Debian 12, qemu-system-common).

What it says goes into a FIFO that it holds itself, and that lets nobody wait: once that is full (64 KiB,
pipe(7)) no more is kept. So what a guest can have it complain of fills nothing of the host's.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path

from kata_shim.errors import ShimError
from kata_shim.qemu.process import FOR_FILES, Process, find_by_log, kill_by_log, last_line, spawn

LOG = "virtiofsd.log"
PIPE = 1 << 16  # bytes
# What its sandbox takes (mount, setpcap: to give up the rest), and to be a file's owner while one is made. It
# gives sys_admin and setpcap up before it reads the first request.
CAPABILITIES = f"{FOR_FILES} setgid setuid sys_admin setpcap"
# Nobody makes devices (mknod). Files of several file systems are told apart (announce_submounts). What else
# it has to say (log_level) would leave no room for its last words.
OPTIONS = "sandbox=namespace,announce_submounts,xattr,modcaps=-mknod,log_level=err"


class Virtiofsd:
    """The virtiofsd of the machine in one directory."""

    def __init__(self, directory: Path, program: str, cache: str) -> None:
        self._program = program
        self._cache = cache  # "none", "auto" or "always": what a guest may
        self._log = directory / LOG
        self._pipe = -1  # the log, open
        self._said = b""
        self._process: Process | None = None
        self.is_missed = False  # a QEMU had to be ended for want of it

    def start(self, shared_directory: str, near: Path) -> socket.socket:
        """Start it; return a connection for QEMU, which nobody else can have. Raises ShimError.

        `near` is a short path of the machine's directory.
        """
        self._log.unlink(missing_ok=True)  # of a machine that did not come up
        os.mkfifo(self._log, 0o600)
        self._open_log(os.O_RDWR)
        path = near / "virtiofsd.sock"
        path.unlink(missing_ok=True)  # of a shim that was killed here
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                os.fchmod(listener.fileno(), 0o600)  # which bind(2) gives to the path
                try:
                    listener.bind(str(path))
                    listener.listen(1)
                    connection.connect(str(path))
                finally:
                    path.unlink(missing_ok=True)
                self._process = spawn(
                    self._command(shared_directory, listener.fileno()),
                    self._pipe,
                    [listener.fileno()],
                    capabilities=CAPABILITIES,
                    field="virtio_fs_daemon",
                )
        except BaseException as error:
            connection.close()
            self.close()
            self._log.unlink()
            if isinstance(error, OSError):
                raise ShimError("internal", f"{path.name}: {error.strerror}") from None
            raise
        return connection

    def attach(self) -> bool:
        """Watch the one that another shim, or a factory, has started; False where there is none any more."""
        for pid, start_time in sorted(find_by_log(self._log), key=_depth):
            try:
                self._process = Process.attach(pid, start_time)
            except ShimError:
                continue  # it has just ended
            self._open_log(os.O_RDONLY)
            return True
        return False

    @property
    def process(self) -> Process:
        """The one that waits, in the mount namespace of the other; raises ShimError before the start."""
        if self._process is None:
            raise ShimError("failed-precondition", "virtiofsd has not been started")
        return self._process

    async def ended(self) -> None:
        """Wait for its end."""
        await asyncio.wait((self.process.exited,))

    async def settle(self, patience: float) -> None:
        """Wait for its end, at most so many seconds: QEMU's takes it along."""
        if self._process is not None:
            await asyncio.wait((self._process.exited,), timeout=patience)

    async def kill(self, patience: float) -> None:
        """See to it that it has ended, by itself within so many seconds; QEMU has, or has never been."""
        await self.settle(patience)
        if self._process is None or not self._process.exited.done():
            await kill_by_log(self._log)

    def close(self) -> None:
        """Let go of it; it goes on."""
        if self._pipe >= 0:
            self._last_words()
            os.close(self._pipe)
            self._pipe = -1
        if self._process is not None:
            self._process.close()

    def cause(self) -> str:
        """Return what it has to do with QEMU's end; "" for nothing."""
        failure = self.failure()
        if not self.is_missed:
            return failure
        text = "virtiofsd has ended, so that nobody serves the guest's files, and QEMU was ended"
        return f"{text}: {failure}" if failure else text

    def failure(self) -> str:
        """Return with what error it has ended, after the field's and the program's names; "" for none."""
        exited = self._process.exited if self._process is not None else None
        status = exited.result() if exited and exited.done() and not exited.cancelled() else None
        if not status:
            return ""
        how = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
        said = self._last_words()
        return f"virtio_fs_daemon: {self._program}: {how}" + (f": {said}" if said else "")

    def _open_log(self, access: int) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        self._pipe = os.open(self._log, access | os.O_NONBLOCK | os.O_CLOEXEC)

    def _last_words(self) -> str:
        with suppress(BlockingIOError):  # nothing since
            self._said = (os.read(self._pipe, PIPE) if self._pipe >= 0 else b"") or self._said
        return last_line(self._said)

    def _command(self, shared_directory: str, listener: int) -> list[str]:
        source = shared_directory.replace("\\", "\\\\").replace(",", "\\,")
        options = f"source={source},cache={self._cache},{OPTIONS}"
        # As many open files as the shim may have, and so QEMU: it has one for each that the guest knows of.
        return [self._program, f"--fd={listener}", "--rlimit-nofile=0", "-o", options]


def _depth(found: tuple[int, int]) -> int:
    """Return in how many process-id namespaces a process is: the one that waits is in one less."""
    try:
        lines = Path(f"/proc/{found[0]}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((len(line.split()) for line in lines if line.startswith("NSpid:")), 0)
