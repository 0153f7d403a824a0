"""Child processes of the agent, which may be PID 1 and then inherits every orphan of the guest."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from kata_shim.errors import ShimError, invalid

_CODES = {errno.ENOENT: "not-found", errno.EACCES: "permission-denied", errno.ENOMEM: "resource-exhausted"}


class Child:
    """A process that was started: `process` has its pipes, `exited` its exit code or 128 + signal."""

    def __init__(self, process: subprocess.Popen[bytes], exited: asyncio.Future[int]) -> None:
        self.process = process
        self.exited = exited
        self.survived = True  # by its process group

    def kill(self, number: int) -> None:
        """Send a signal to the process group, also to what is left of it when the process itself has ended.

        Linux gives no process a number that a group has. So where one has it now, the group is gone.
        """
        if self.exited.done() and (not self.survived or os.path.exists(f"/proc/{self.process.pid}")):
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Children:
    """Starts processes and reaps all that end, the agent's own and the inherited ones, in one place."""

    def __init__(self) -> None:
        """Take over SIGCHLD. Needs a running loop, in the main thread."""
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, Child] = {}
        self._adopted: dict[int, asyncio.Future[int]] = {}
        self._adopting = 0
        self._ended: dict[int, int] = {}  # orphans that ended while somebody may be about to adopt them
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._reap()

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        stdin: int,
        stdout: int,
        stderr: int,
        program: str | None = None,
    ) -> Child:
        """Start a process in a session of its own; its streams are given as subprocess.Popen takes them.

        `program` is the file to be run if argv[0] is only what it is called.
        Raises `not-found`, `permission-denied` or `invalid-argument`, saying what of it cannot be run.
        """
        if not argv:
            raise invalid("argv: no command given")
        try:
            process = subprocess.Popen(
                argv,
                executable=program,
                bufsize=0,
                env=env,
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            if error.filename == cwd:
                raise ShimError("not-found", f"cwd: {cwd}: {error.strerror}") from None
            words = error.strerror if "/" in argv[0] else "command not found"
            raise ShimError("not-found", f"{argv[0]}: {words}") from None
        except OSError as error:
            code = _CODES.get(error.errno or 0, "invalid-argument")
            raise ShimError(code, f"{error.filename or argv[0]}: {error.strerror}") from None
        except ValueError as error:
            raise invalid(f"argv, env or cwd: {error}") from None
        child = Child(process, self._loop.create_future())
        self._running[process.pid] = child
        return child

    async def run(self, argv: Sequence[str]) -> None:
        """Run a program of the guest's own; raises `internal` with what it wrote to stderr if it fails."""
        nothing = subprocess.DEVNULL
        child = self.spawn(
            argv, env=os.environ, cwd="/", stdin=nothing, stdout=nothing, stderr=subprocess.PIPE
        )
        assert child.process.stderr is not None
        with child.process.stderr as stderr:
            status = await child.exited
            os.set_blocking(stderr.fileno(), False)
            words = (stderr.read(4096) or b"").decode(errors="replace").strip()
        if status:
            raise ShimError("internal", f"{' '.join(argv)}: exit status {status}: {words}")

    @contextmanager
    def adopting(self) -> Iterator[Callable[[int], asyncio.Future[int]]]:
        """Yield what takes over a process that a child leaves behind: pid -> its exit code, or 128 + signal.

        It may have ended by then, if only it had not when this was entered.
        """
        self._adopting += 1
        try:
            yield self._adopt
        finally:
            self._adopting -= 1
            if not self._adopting:
                self._ended.clear()

    def _adopt(self, pid: int) -> asyncio.Future[int]:
        exited = self._loop.create_future()
        if pid in self._ended:
            exited.set_result(self._ended.pop(pid))
        else:
            self._adopted[pid] = exited
        return exited

    def close(self) -> None:
        """Kill what runs, reap it, and give SIGCHLD back."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        for child in self._running.values():
            child.kill(signal.SIGKILL)
            child.process.wait()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            exit_status = code if code >= 0 else 128 - code
            if child := self._running.pop(pid, None):
                child.process.returncode = code
                child.survived = _is_group(pid)
                child.exited.set_result(exit_status)
            elif adopted := self._adopted.pop(pid, None):
                adopted.set_result(exit_status)
            elif self._adopting:
                self._ended[pid] = exit_status


def _is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
