"""kata-runtime kata-check and version: what this host can do, and what this program is."""

from __future__ import annotations

import json
import subprocess
import sys

import kata_shim
from kata_shim.cli.terminal import write
from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments


def check(arguments: Arguments) -> int:
    """Print what the shim finds out about the host; exit status 1 when a sandbox cannot run on it."""
    command = [sys.executable, "-I", "-m", "kata_shim.shim", "check", "--root", arguments.root]
    if arguments.has("--config"):
        command += ["--config", arguments.last("--config")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        found = json.loads(done.stdout)
        if not isinstance(found, dict):
            raise ValueError
    except ValueError:
        raise ShimError(
            "unavailable", f"the check ended with status {done.returncode} and no answer"
        ) from None
    if arguments.has("--json"):
        write(1, done.stdout.strip() + b"\n")
    else:
        lines = list(_lines("", found))
        width = max((len(name) for name, _ in lines), default=0)
        write(1, "".join(f"{name:{width}}: {text}\n" for name, text in lines).encode())
    return 1 if done.returncode else 0


def _lines(above: str, value: Any) -> list[tuple[str, str]]:
    """Return a line for every leaf of `value`, named by the keys that lead to it."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in _lines(f"{above}{key} ", inner)]
    if isinstance(value, list):
        return [line for inner in value for line in _lines(above, inner)]
    if isinstance(value, bool):
        return [(above, "yes" if value else "no")]
    return [(above, "-" if value is None else str(value))]


def version(_: Arguments) -> int:
    """Print the versions of this program and of the OCI runtime specification it follows."""
    write(1, f"kata-runtime  : {kata_shim.__version__}\n   OCI specs: 1.0.2\n".encode())
    return 0
