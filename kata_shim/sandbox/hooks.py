"""The hooks of an OCI bundle that belong to the host (runtime-spec, config.md, POSIX-platform Hooks)."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from typing import Any

import orjson

from kata_shim.errors import ShimError, invalid

STDERR_MOST = 4096  # bytes of what a hook that fails has to say
TIMEOUT = 60.0  # seconds for a hook that names none


async def run(hooks: object, state: dict[str, Any]) -> None:
    """Run hooks one after another, each with the container's state on its stdin.

    Raises ShimError for the first that fails; those after it are not run. A hook that takes longer than its
    timeout, or whose caller gives up, is killed.
    """
    if not isinstance(hooks, list):
        return
    for hook in hooks:
        await _run(_checked(hook), orjson.dumps(state))


def _checked(hook: object) -> dict[str, Any]:
    if not isinstance(hook, dict) or not str(hook.get("path", "")).startswith("/"):
        raise invalid("config.json: hooks: a path must be absolute")
    return hook


async def _run(hook: dict[str, Any], state: bytes) -> None:
    path, timeout = str(hook["path"]), float(hook.get("timeout") or TIMEOUT)
    words: Sequence[str] = [str(word) for word in hook.get("args") or [path]]
    environment = dict(str(one).partition("=")[::2] for one in hook.get("env") or [])
    try:
        process = await asyncio.create_subprocess_exec(
            *words, executable=path, env=environment, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, cwd="/"
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
            process.kill()
            await process.wait()
    if process.returncode:
        words_of_it = said[-STDERR_MOST:].decode(errors="replace").strip()
        text = f"hook {path}: exit status {process.returncode}: {words_of_it}"
        raise ShimError("failed-precondition", text)
