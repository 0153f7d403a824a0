"""kata-runtime exec: a command in a container or the guest, its stdin, stdout and stderr joined to ours."""

from __future__ import annotations

import binascii
import json
import os
import select
import signal

from kata_shim import client, registry, shims
from kata_shim.cli.arguments import UsageError
from kata_shim.cli.terminal import say, write
from kata_shim.errors import ShimError, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments
    from kata_shim.cli.tty import Terminal

CHUNK = 48 * 1024
WINDOW = 16  # pieces of stdin that may be under way; the shim says when the command has taken one
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def execute(arguments: Arguments) -> int:
    """Run a command in the container, or the guest where there is none, or with --guest.

    The status is its own, 128+n for a signal, 126 or 127 where it cannot run. The first signal cancels the
    command and waits for its end, a second one leaves at once: status 128+n.
    """
    sandbox_id, container = registry.resolve_container(arguments.root, arguments.words[0])
    argv = arguments.words[1:]
    if not argv:
        raise UsageError("which command?")
    params = command(arguments, argv)
    if arguments.has("--guest"):
        params["guest"] = True
    elif container:
        params["container"] = container
    terminal = terminal_of(arguments, params)
    return attend(shims.connect(arguments.root, sandbox_id, say), "sandbox.exec", params, terminal)


def command(arguments: Arguments, argv: list[str]) -> dict[str, Any]:
    """Return the params that say what is to be run; raises UsageError."""
    environment = {}
    for setting in arguments.all("--env"):
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UsageError(f"--env: {setting} is not NAME=VALUE")
        environment[name] = value
    return {"argv": argv, "env": environment, "cwd": arguments.last("--cwd") or None}


def terminal_of(arguments: Arguments, params: dict[str, Any]) -> Terminal | None:
    """Return our terminal if the command is to have one, and say so in `params`; raises ShimError."""
    if not arguments.has("--tty") and not arguments.has("-t"):
        return None
    from kata_shim.cli.tty import Terminal

    terminal = Terminal()
    params["terminal"], params["size"] = True, terminal.size()
    return terminal


def attend(
    connection: client.Connection, method: str, params: dict[str, Any], terminal: Terminal | None = None
) -> int:
    """Call what runs a command, its streams joined to ours, and return its status."""
    return _Pump(connection, terminal).run(method, encode(params))


def encode(params: dict[str, Any]) -> bytes:
    """Return the params that say what is to be run as JSON text; raises ShimError."""
    try:
        return json.dumps(params, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("argv, --env, --cwd: not UTF-8") from None


class _Pump:
    """Moves bytes between our descriptors and the shim, never waiting for one while another could go on."""

    def __init__(self, connection: client.Connection, terminal: Terminal | None) -> None:
        self._connection = connection
        self._terminal = terminal
        self._call = 0
        self._unsent = bytearray()
        self._stdin_open = True
        self._window = WINDOW
        self._signal = 0
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        if terminal is not None:
            signal.signal(signal.SIGWINCH, lambda *_: None)
        for number in _FORWARDED:
            # The wakeup descriptor carries the number; a handler must be there for Python to write it. What
            # the caller ignores (nohup, a shell's background job) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def run(self, method: str, params: bytes) -> int:
        if self._terminal is None:
            return self._run(method, params)
        self._terminal.make_raw()
        try:
            return self._run(method, params)
        finally:
            self._terminal.restore()

    def _run(self, method: str, params: bytes) -> int:
        self._call, request = self._connection.request(method, params)
        self._unsent += request
        self._connection.socket.setblocking(False)
        try:
            while True:
                status = self._step()
                if status is not None:
                    return status
        except ShimError as error:
            if self._signal:
                return 128 + self._signal
            cannot_run = error.attrs.get("exit_status")
            if not isinstance(cannot_run, int):
                raise
            if self._terminal is not None:
                self._terminal.restore()
            say(error.message)
            return cannot_run

    def _step(self) -> int | None:
        shim = self._connection.socket.fileno()
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(shim, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if self._stdin_open and not self._unsent and self._window:
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        if self._wake in ready and self._take_signals():
            return 128 + self._signal
        if shim in ready and ready[shim] & ~select.POLLOUT:
            for line in self._connection.receive():
                result = self._connection.judge(line, self._call, self._take_progress)
                if result is not None:
                    return _status(result)
        if shim in ready and ready[shim] & select.POLLOUT:
            self._send()
        if 0 in ready:
            self._read_stdin()
        return None

    def _take_signals(self) -> bool:
        """Cancel the command for the first signal; tell whether there was a second one."""
        for number in os.read(self._wake, 64):
            if number == signal.SIGWINCH:
                assert self._terminal is not None
                self._unsent += b'{"id":%d,"resize":[%d,%d]}\n' % (self._call, *self._terminal.size())
            elif self._signal:
                return True
            else:
                self._cancel(number)
        return False

    def _cancel(self, number: int) -> None:
        self._signal = number
        self._unsent += client.cancellation(self._call)

    def _take_progress(self, progress: Any) -> None:
        if isinstance(progress, dict) and isinstance(progress.get("stdin"), int):
            self._window += progress["stdin"]
        _write_output(progress)

    def _send(self) -> None:
        try:
            sent = self._connection.socket.send(self._unsent)
        except (BrokenPipeError, ConnectionResetError):
            raise self._connection.death() from None
        del self._unsent[:sent]

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._stdin_open = bool(data)
        if not data and self._terminal is not None:  # it was hung up; its own end of input is a key
            if not self._signal:
                self._cancel(signal.SIGHUP)
            return
        self._window -= 1
        text = b'"%s"' % binascii.b2a_base64(data, newline=False) if data else b"null"
        self._unsent += b'{"id":%d,"stdin":%s}\n' % (self._call, text)


def _write_output(progress: Any) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        if isinstance(progress, dict) and stream in progress:
            try:
                data = binascii.a2b_base64(progress[stream], strict_mode=True)
            except (TypeError, ValueError):
                raise ShimError("data-loss", f"the shim's {stream} is not base64") from None
            write(descriptor, data)


def _status(result: bytes) -> int:
    try:
        status = json.loads(result)["exit_status"]
    except (ValueError, TypeError, KeyError):
        status = None
    if not isinstance(status, int) or not 0 <= status <= 255:
        raise ShimError("data-loss", f"the shim's answer is not of its protocol: {result[:80]!r}")
    return status
