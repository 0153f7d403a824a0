"""Commands that the shim runs in the guest: StartCommand … KillCommand of the service kata_shim.Guest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from itertools import count

from google.protobuf.empty_pb2 import Empty

from kata_shim.errors import ShimError, invalid
from kata_shim.guest.children import Child, Children
from kata_shim.guest.pipe import Pipe, take
from kata_shim.protos import guest_pb2

MAX_COMMANDS = 256  # of one session
MAX_CHUNK = 1 << 20  # bytes of output in one answer


class _Command:
    def __init__(self, child: Child) -> None:
        process = child.process
        self.child = child
        self.stdin = take(process.stdin) if process.stdin else None
        assert process.stdout is not None
        assert process.stderr is not None
        self.output = {
            guest_pb2.STDOUT: take(process.stdout),
            guest_pb2.STDERR: take(process.stderr),
        }
        self.waited = False
        self.killed = False

    @property
    def done(self) -> bool:
        """Nobody has anything to ask of it any more."""
        return self.waited and (self.killed or all(pipe.closed for pipe in self.output.values()))

    def close(self) -> None:
        for pipe in (self.stdin, *self.output.values()):
            if pipe is not None:
                pipe.close()


class Commands:
    """The commands of one session of the channel.

    A command is forgotten when it was waited for and its output was read to the end or it was killed. Those
    of a session that has ended are killed: nobody can ask for them any more.
    """

    def __init__(self, children: Children) -> None:
        self._children = children
        self._commands: dict[int, _Command] = {}
        self._ids = count(1)

    def abandon(self) -> None:
        """Kill and forget all commands."""
        while self._commands:
            _, command = self._commands.popitem()
            command.child.kill(signal.SIGKILL)
            command.close()

    async def start_command(self, request: guest_pb2.StartCommandRequest) -> guest_pb2.StartCommandResponse:
        """Start a command with the agent's environment and the request's on top."""
        if len(self._commands) >= MAX_COMMANDS:
            raise ShimError("resource-exhausted", f"more than {MAX_COMMANDS} commands at once")
        env = dict(os.environ)
        for variable in request.env:
            name, equals, value = variable.partition("=")
            if not name or not equals:
                raise invalid(f"env: {variable} is not NAME=value")
            env[name] = value
        child = self._children.spawn(
            list(request.argv),
            env=env,
            cwd=request.cwd or "/",
            stdin=subprocess.PIPE if request.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        command_id = next(self._ids)
        self._commands[command_id] = _Command(child)
        return guest_pb2.StartCommandResponse(command_id=command_id)

    async def write_stdin(self, request: guest_pb2.WriteStdinRequest) -> Empty:
        """Write to the command's stdin; answers when the pipe has taken all of it."""
        await self._stdin(request.command_id).write(request.data)
        return Empty()

    async def close_stdin(self, request: guest_pb2.CloseStdinRequest) -> Empty:
        """Close the command's stdin; nothing happens where it is closed."""
        self._stdin(request.command_id).close()
        return Empty()

    async def read_output(self, request: guest_pb2.ReadOutputRequest) -> guest_pb2.ReadOutputResponse:
        """Answer what the command wrote, as soon as there is some; empty data is the end."""
        command = self._find(request.command_id)
        pipe = command.output.get(request.stream)
        if pipe is None or not request.len:
            raise invalid(f"stream: {request.stream} is not 1 or 2, or len: {request.len} is 0")
        data = await pipe.read(min(request.len, MAX_CHUNK))
        self._forget_if_done(request.command_id, command)
        return guest_pb2.ReadOutputResponse(data=data)

    async def wait_command(self, request: guest_pb2.WaitCommandRequest) -> guest_pb2.WaitCommandResponse:
        """Answer the exit code, or 128 + signal number, when the command has ended."""
        command = self._find(request.command_id)
        status = await asyncio.shield(command.child.exited)
        command.waited = True
        self._forget_if_done(request.command_id, command)
        return guest_pb2.WaitCommandResponse(status=status)

    async def kill_command(self, request: guest_pb2.KillCommandRequest) -> Empty:
        """Send a signal to the command's process group; nothing happens when all of it has ended."""
        command = self._find(request.command_id)
        if not 1 <= request.signal < signal.NSIG:
            raise invalid(f"signal: {request.signal} is not within 1..{signal.NSIG - 1}")
        command.child.kill(request.signal)
        command.killed = command.killed or request.signal == signal.SIGKILL
        return Empty()

    def _find(self, command_id: int) -> _Command:
        command = self._commands.get(command_id)
        if command is None:
            raise ShimError("not-found", f"command_id: there is no command {command_id}")
        return command

    def _stdin(self, command_id: int) -> Pipe:
        pipe = self._find(command_id).stdin
        if pipe is None:
            raise ShimError("failed-precondition", f"stdin: command {command_id} was started without it")
        return pipe

    def _forget_if_done(self, command_id: int, command: _Command) -> None:
        if command.done:
            self._commands.pop(command_id, None)
            command.close()
