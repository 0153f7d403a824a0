"""The hooks of an OCI bundle that belong to the host (runtime-spec, config.md, POSIX-platform Hooks)."""

from __future__ import annotations

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from kata_shim.errors import ShimError, invalid
from kata_shim.quoting import quoted

STDERR_MOST = 4096  # bytes of what a hook that fails has to say
TIMEOUT = 60  # seconds for a hook that names none
TIMEOUT_MOST = 3600


async def run(hooks: object, state: dict[str, Any]) -> None:
    """Run hooks one after another, each with the container's state on its stdin.

    Raises ShimError for the first that fails; those after it are not run. A hook that takes longer than its
    timeout, or whose caller gives up, is killed.
    """
    if not isinstance(hooks, list):
        return
    for hook in hooks:
        await _run(check(hook), orjson.dumps(state))


class Hook(NamedTuple):
    """One hook."""

    path: str
    words: Sequence[str]
    environment: dict[str, str]
    timeout: float


def check(hook: object) -> Hook:
    """Return a hook of config.json; raises ShimError `invalid-argument` that names the field."""
    if not isinstance(hook, dict):
        raise invalid("config.json: hooks: not an object")
    path, timeout = hook.get("path"), hook.get("timeout") or TIMEOUT
    if not _is_word(path) or not str(path).startswith("/"):
        raise invalid(f"config.json: hooks: path: {quoted(path)} is not absolute")
    for name in ("args", "env"):
        words = hook.get(name) or []
        if not isinstance(words, list) or not all(_is_word(word) for word in words):
            raise invalid(f"config.json: hooks: {name}: not an array of strings without NUL")
    if isinstance(timeout, bool) or not isinstance(timeout, int) or not 0 < timeout <= TIMEOUT_MOST:
        raise invalid(f"config.json: hooks: timeout: {quoted(timeout)} is not within 1..{TIMEOUT_MOST}")
    environment = dict(one.partition("=")[::2] for one in hook.get("env") or [])
    environment.pop("", None)  # execve(2) would take it, and no program could read it
    return Hook(str(path), hook.get("args") or [str(path)], environment, timeout)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


async def _run(hook: Hook, state: bytes) -> None:
    path, words, environment, timeout = hook
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            executable=path,
            env=environment,
            stdin=PIPE,
            stdout=DEVNULL,
            stderr=PIPE,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise ShimError("failed-precondition", f"hook {path}: {error.strerror}") from None
    try:
        async with asyncio.timeout(timeout):
            _, said = await process.communicate(state)
    except TimeoutError:
        raise ShimError("deadline-exceeded", f"hook {path}: not done within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            await process.wait()
    if process.returncode:
        words_of_it = said[-STDERR_MOST:].decode(errors="replace").strip()
        text = f"hook {path}: exit status {process.returncode}: {words_of_it}"
        raise ShimError("failed-precondition", text)
