"""kata-runtime kata-network: the documented commands, whose stdout is the shim's result and nothing else."""

from __future__ import annotations

from kata_shim import registry, shims
from kata_shim.cli.arguments import UsageError
from kata_shim.cli.terminal import say, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata_shim.cli.arguments import Arguments

# Each command, and whether it reads a file.
COMMANDS = {
    "add-iface": True,
    "update-iface": True,
    "del-iface": True,
    "list-ifaces": False,
    "add-route": True,
    "del-route": True,
    "list-routes": False,
    "update-routes": True,
}


def network(arguments: Arguments) -> int:
    """Run one kata-network command: `words` are the command, the id and the file."""
    if not arguments.words:
        raise UsageError("which command?")
    command, *words = arguments.words
    if command not in COMMANDS:
        raise UsageError(f"{command}: unknown command")
    if len(words) > 1 + COMMANDS[command]:
        raise UsageError(f"{command}: unexpected argument {words[1 + COMMANDS[command]]}")
    if COMMANDS[command] and words and words[1:] in ([], [""]):
        raise UsageError(f"{command}: a file is needed, or - for stdin")
    sandbox_id = registry.resolve(arguments.root, words[0] if words else "")
    params = b""
    if COMMANDS[command]:
        from kata_shim.cli import document

        params = document.read(words[1])
    connection = shims.connect(arguments.root, sandbox_id, say)
    result = connection.call(f"kata-network.{command}", params) + b"\n"
    try:
        write(1, result)
    except OSError as error:
        if not COMMANDS[command]:
            raise
        # A failure for whoever wanted the result, but no reason to try again.
        say(f"kata-runtime: stdout: {error.strerror}; {command} is done all the same")
        return 1
    return 0
