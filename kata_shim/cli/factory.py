"""kata-runtime factory: keep ready what sandboxes start from. Another program does it, which we become."""

from __future__ import annotations

import os
import sys

from kata_shim.cli.arguments import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from kata_shim.cli.arguments import Arguments

_COMMANDS = ("init", "status", "destroy")


def factory(arguments: Arguments) -> NoReturn:
    """Become `containerd-shim-kata-v2 factory`, which alone reads configuration.toml."""
    if not arguments.words:
        raise UsageError(f"which of {', '.join(_COMMANDS)}?")
    (word,) = arguments.words
    if word not in _COMMANDS:
        raise UsageError(f"{word}: unknown command; it is one of {', '.join(_COMMANDS)}")
    if word != "status" and arguments.has("--json"):
        raise UsageError(f"--json: {word} prints nothing")
    command = [sys.executable, "-I", "-m", "kata_shim.shim", "factory", word, "--root", arguments.root]
    if arguments.has("--config"):
        command += ["--config", os.path.abspath(arguments.last("--config"))]
    if arguments.has("--json"):
        command += ["--format", "json"]
    os.execv(command[0], command)
