"""The OCI runtime of the guest, crun or runc, as a program that is run for each command.

Under emulation each run of it takes 0.2 s and more, so what crun's own files allow is done without it: its
`create` leaves a process that waits at a FIFO, and a container all of whose processes have ended is only
files and control groups.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from contextlib import nullcontext, suppress
from typing import Any

from kata_shim.errors import ShimError
from kata_shim.guest import system
from kata_shim.guest.children import Children
from kata_shim.guest.process import Process, Streams
from kata_shim.guest.sealed import Program

_STATE = "/run/kata-containers/runtime"
_FORMAT = {"runc": ("--log-format=json",)}  # its text is quoted twice


class Runtime:
    """Runs the program's commands for one container, one at a time: it refuses two at once."""

    def __init__(self, program: Program, children: Children, container_id: str, directory: str) -> None:
        """Work in `directory`, the container's bundle."""
        self._program, self._path = program
        self._children = children
        self._id = container_id
        self._directory = directory
        self._state = f"{_STATE}/{container_id}"
        self._lock = asyncio.Lock()
        # crun sets the personality of what it executes, as config.json has it; runc of Debian 12 does not.
        repeats = self._program == "crun" and system.is_emulated()
        self._placed = system.addresses_fixed if repeats else nullcontext

    async def create(self, *, terminal: bool) -> Process:
        """Make the container of the bundle; return its first process, which waits for `start`."""
        return await self._launch(self._id, "create", f"--bundle={self._directory}", terminal=terminal)

    async def start(self, *, hooks: bool) -> None:
        """Let the first process begin; `hooks`: there are some to be run then."""
        if self._program == "crun" and not hooks:
            path = f"{self._state}/exec.fifo"
            with suppress(OSError):  # it has gone on or ended; crun tells
                fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.write(fifo, b"0")
                finally:
                    os.close(fifo)
                os.unlink(path)
                return
        await self._run("start", self._id)

    async def exec(self, exec_id: str, process: dict[str, Any]) -> Process:
        """Start one more process."""
        path = self.write(f"{exec_id}.process.json", process)
        terminal = bool(process.get("terminal"))
        try:
            return await self._launch(exec_id, "exec", "--detach", f"--process={path}", terminal=terminal)
        finally:
            os.unlink(path)

    async def update(self, resources: dict[str, Any]) -> None:
        """Change the limits."""
        path = self.write("resources.json", resources)
        await self._run("update", f"--resources={path}", self._id)

    async def delete(self, *, hooks: bool) -> None:
        """Forget the container, all of whose processes have ended; `hooks`: it has some to be run."""
        if self._program == "crun" and not hooks:
            shutil.rmtree(self._state, ignore_errors=True)
        else:
            await self._run("delete", "--force", self._id)

    def write(self, name: str, value: object) -> str:
        """Write a JSON file of the bundle; return its path."""
        path = f"{self._directory}/{name}"
        with open(path, "w") as file:
            file.write(json.dumps(value))  # which C encodes; for dump() Python does
        return path

    async def _launch(self, exec_id: str, *words: str, terminal: bool) -> Process:
        """Have the runtime start a process, which it leaves to us."""
        pid_file = f"{self._directory}/{exec_id}.pid"
        streams = Streams(self._directory, terminal=terminal)
        try:
            with self._children.adopting() as adopt:
                await self._run(
                    *words, f"--pid-file={pid_file}", *streams.words, self._id, streams=streams.given
                )
                streams.begin()
                pid = _take_number(pid_file)
                return Process(pid, adopt(pid), streams)
        except BaseException:
            streams.close()
            raise

    async def _run(self, *words: str, streams: list[int] | None = None) -> None:
        """Run the program; raises ShimError with its own words."""
        stdin, stdout, stderr = streams or [subprocess.DEVNULL] * 3
        log = f"{self._directory}/runtime.log"
        options = (*_FORMAT.get(self._program, ()), f"--root={_STATE}", f"--log={log}")
        argv = [self._program, *options, *words]
        async with self._lock:
            with suppress(FileNotFoundError):
                os.unlink(log)  # what an earlier run had to say is not this one's
            with self._placed():
                child = self._children.spawn(
                    argv,
                    env=os.environ,
                    cwd="/",
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    program=self._path,
                )
            if status := await child.exited:
                why = _last_words(log) or f"exit status {status}"
                raise ShimError(_code(why), f"{self._program} {words[0]}: {why}")


def _code(why: str) -> str:
    """Return what crun's or runc's words mean: of a program to be run they say what execve(2) does."""
    if "executable file" not in why and "exec" not in why:
        return "internal"
    if "No such file" in why or "not found" in why:
        return "not-found"
    return "permission-denied" if "ermission denied" in why else "internal"


def _take_number(path: str) -> int:
    with open(path) as file:
        number = int(file.read())
    os.unlink(path)
    return number


def _last_words(log: str) -> str:
    try:
        with open(log, errors="replace") as file:
            line = file.read()[-4000:].strip().rpartition("\n")[2]
    except OSError:
        return ""
    with suppress(ValueError, KeyError, TypeError):  # crun writes text, and runc what it is asked for
        return str(json.loads(line)["msg"])
    return line
