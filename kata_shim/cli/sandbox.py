"""kata-runtime list, state and delete: a sandbox's life without containerd, but for its start (run.py)."""

from __future__ import annotations

import json
import os
import time

from kata_shim import client, registry, shims
from kata_shim.cli import silent
from kata_shim.cli.terminal import say, write
from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments

OCI_VERSION = "1.0.2"
LIST_TIMEOUT = 2.0
_COLUMNS = ("id", "status", "pid", "accelerator", "created")
_HEADINGS = ("ID", "STATE", "PID", "ACCELERATOR", "CREATED")


def delete(arguments: Arguments) -> int:
    """Delete a sandbox: without --force a stopped one; with it any, and one that is not there is no error."""
    root, force = arguments.root, arguments.has("--force")
    try:
        sandbox_id = registry.resolve(root, arguments.words[0])
    except ShimError as error:
        if force and error.code == "not-found":
            return 0
        raise
    try:
        silent.delete(root, sandbox_id, force=force)
    except ShimError as error:
        if error.code != "unavailable":
            raise
        # Another's delete may have taken the shim from under this one, or no shim may be able to start.
        if os.path.lexists(registry.sandbox_directory(root, sandbox_id)):
            if not force:
                raise
            registry.remove(root, sandbox_id)
    return 0


def state(arguments: Arguments) -> int:
    """Print a sandbox's state as the OCI runtime specification has it, and our own keys after it."""
    sandbox_id = registry.resolve(arguments.root, arguments.words[0])
    answer = silent.call(arguments.root, sandbox_id, "sandbox.state")
    write(1, _dump(_described(sandbox_id, json.loads(answer))) + b"\n")
    return 0


def list_all(arguments: Arguments) -> int:
    """Print every sandbox of the root. One whose shim is dead or silent is `unknown`: none is started."""
    sandboxes = _ask_all(arguments.root)
    if arguments.has("--json"):
        write(1, _dump(sandboxes) + b"\n")
        return 0
    rows = [_HEADINGS, *(tuple(str(sandbox.get(key) or "-") for key in _COLUMNS) for sandbox in sandboxes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    write(1, "".join(f"{line}\n" for line in lines).encode())
    return 0


def _ask_all(root: str) -> list[dict[str, Any]]:
    """Return the state of every sandbox; all are asked before the first answer is waited for."""
    asked: dict[str, tuple[client.Connection, int] | None] = {}
    for sandbox_id in registry.list_ids(root):
        try:
            connection = shims.connect(root, sandbox_id, revive=False)
            call, request = connection.request("sandbox.state")
            connection.send(request)
            asked[sandbox_id] = (connection, call)
        except (ShimError, OSError):
            asked[sandbox_id] = None
    deadline = time.monotonic() + LIST_TIMEOUT
    found = []
    for sandbox_id, pending in asked.items():
        try:
            if pending is None:
                raise TimeoutError
            connection, call = pending
            connection.socket.settimeout(max(0.01, deadline - time.monotonic()))
            found.append(_described(sandbox_id, json.loads(connection.answer(call))))
        except (ShimError, OSError) as error:
            if pending is not None and isinstance(error, TimeoutError):
                say(f"{sandbox_id}: its shim does not answer within {LIST_TIMEOUT:g} s")
            if os.path.isdir(registry.sandbox_directory(root, sandbox_id)):
                found.append(
                    _described(sandbox_id, _recorded(root, sandbox_id) | {"state": "unknown", "pid": 0})
                )
    return found


def _recorded(root: str, sandbox_id: str) -> dict[str, Any]:
    """Return what does not change in a sandbox's record; nothing where there is none that can be read."""
    try:
        with open(f"{registry.sandbox_directory(root, sandbox_id)}/record.json", "rb") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {key: record[key] for key in ("accelerator", "created") if key in record}


def _described(sandbox_id: str, answer: Any) -> dict[str, Any]:
    values = dict(answer) if isinstance(answer, dict) else {}
    status = values.pop("state", "unknown")
    described = {"ociVersion": OCI_VERSION, "id": sandbox_id, "status": status, "pid": values.pop("pid", 0)}
    return described | {key: value for key, value in values.items() if key not in described}


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
