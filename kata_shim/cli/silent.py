"""A shim that says nothing, stopped (SIGSTOP) or hanging: callers hear of it, a forced delete ends it."""

from __future__ import annotations

import os

# signal.py turns every constant into an enum; typeshed has only that.
from _signal import SIGKILL, pidfd_send_signal  # type: ignore[import-not-found]

from kata_shim import registry, shims
from kata_shim.cli.terminal import say
from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SILENCE = 5.0  # seconds: after these a shim is asked whether it lives, and it has as many to say so
END_TIMEOUT = 5.0  # seconds from SIGKILL to the end


class SilentError(ShimError):
    """The shim does not even answer a call that it has nothing to do for."""


def call(
    root: str,
    sandbox_id: str,
    method: str,
    params: bytes = b"",
    *,
    revive: bool = True,
    silence: float = SILENCE,
) -> bytes:
    """Call the shim; what it does may take long, as long as it can be heard.

    Raises SilentError when it cannot, or as Connection.call. KeyboardInterrupt is passed on at once.
    """
    connection = shims.connect(root, sandbox_id, say, revive=revive)
    number, request = connection.request(method, params)
    connection.send(request)
    connection.socket.settimeout(silence)
    while True:
        try:
            return connection.answer(number)
        except TimeoutError:
            _need_life(root, sandbox_id, silence)


def delete(root: str, sandbox_id: str, *, force: bool, revive: bool = True) -> None:
    """Have the sandbox deleted; with `force` a silent shim is killed first, and the next one does it."""
    params = b'{"force":true}' if force else b'{"force":false}'
    try:
        call(root, sandbox_id, "sandbox.delete", params, revive=revive)
    except SilentError:
        if not force:
            raise
        _end(root, sandbox_id)
        call(root, sandbox_id, "sandbox.delete", params, revive=revive)


def clear(root: str, sandbox_id: str, silence: float) -> None:
    """Delete a sandbox whose shim has died, or is silent for so many seconds; one that serves a pod stays."""
    params = b'{"force":true,"unless_pod":true}'
    for last in (False, False, True):
        try:
            call(root, sandbox_id, "sandbox.delete", params, silence=silence)
            return
        except SilentError:
            _end(root, sandbox_id)
            if last:
                raise
        except ShimError as error:
            # One on its way out takes no more calls; a new one finds what it has left, if anything.
            if not os.path.lexists(registry.sandbox_directory(root, sandbox_id)):
                return
            if last or error.code != "unavailable":
                raise


def _need_life(root: str, sandbox_id: str, silence: float) -> None:
    try:
        connection = shims.connect(root, sandbox_id, revive=False)
        connection.socket.settimeout(silence)
        connection.call("shim.ping")
    except TimeoutError:
        pass
    except ShimError:
        return  # an answer, too; and if it has ended, whoever waits for it hears of that
    else:
        return
    pids = [pid for pid, _ in _shims(root, sandbox_id)]
    which = f" (process {pids[0]})" if pids else ""
    wake = f"`kill -CONT {pids[0]}` wakes it if it was stopped, " if pids else ""
    raise SilentError(
        "deadline-exceeded",
        f"the shim of {sandbox_id}{which} does not answer; {wake}`kata-runtime delete --force {sandbox_id}`"
        " ends it and the sandbox",
    )


def _end(root: str, sandbox_id: str) -> None:
    import select

    for pid, pidfd in _shims(root, sandbox_id):
        pidfd_send_signal(pidfd, SIGKILL)
        if not select.select([pidfd], [], [], END_TIMEOUT)[0]:
            raise ShimError("deadline-exceeded", f"the shim of {sandbox_id} (process {pid}) outlives SIGKILL")


def _shims(root: str, sandbox_id: str) -> Iterator[tuple[int, int]]:
    """Yield pid and pidfd of every process of ours that is a shim and writes the log of this sandbox.

    The pidfd is opened before the look, so it is of the process that was looked at, or of none any more.
    """
    log = os.stat(f"{registry.sandbox_directory(root, sandbox_id)}/shim.log")
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            if _is_shim(f"/proc/{name}", log):
                yield int(name), pidfd
        finally:
            os.close(pidfd)


def _is_shim(process: str, log: os.stat_result) -> bool:
    try:
        with open(f"{process}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
        return b"kata_shim.shim" in words and os.path.samestat(os.stat(f"{process}/fd/1"), log)
    except OSError:
        return False
