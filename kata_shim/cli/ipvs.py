"""kata-runtime kata-ipvs: IPVS rules of a running sandbox's guest, in ipvsadm's language."""

from __future__ import annotations

# As the json package uses them; importing that takes longer than all else here.
from _json import encode_basestring, scanstring

from kata_shim import client
from kata_shim.cli.arguments import UsageError
from kata_shim.cli.terminal import ProgressLine, write
from kata_shim.errors import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments

COMMANDS = ("ipvsadm", "cleanup")


def ipvs(arguments: Arguments) -> int:
    """Run one kata-ipvs command: `words` are the command and the id."""
    if not arguments.words:
        raise UsageError("which command?")
    command, *words = arguments.words
    if command not in COMMANDS:
        raise UsageError(f"{command}: unknown command")
    if len(words) > 1:
        raise UsageError(f"{command}: unexpected argument {words[1]}")
    flags = [flag for flag in ("--parameters", "--restore") if arguments.has(flag)]
    if len(flags) != 1 or (command == "cleanup" and flags != ["--parameters"]):
        rule = "--parameters" if command == "cleanup" else "either --parameters or --restore"
        raise UsageError(f"{command}: {rule} is needed")
    if arguments.has("--dialect") and flags != ["--parameters"]:
        raise UsageError(f"{command}: --dialect goes with --parameters")
    sandbox_id = client.resolve(arguments.root, words[0] if words else "")
    if flags == ["--restore"]:
        method, params = "restore", b'{"rules":%b}' % _rules(arguments.last("--restore"))
    else:
        method, params = command, b'{"parameters":%b}' % _quoted(arguments.last("--parameters"))
    if arguments.has("--dialect"):
        params = b'%b,"dialect":%b}' % (params[:-1], _quoted(arguments.last("--dialect")))
    line = ProgressLine()
    connection = client.connect(arguments.root, sandbox_id, line.say)
    try:
        result = connection.call(f"kata-ipvs.{method}", params, _Bar(line).show if line.is_shown else None)
    finally:
        line.clear()
    if not result.startswith(b'"'):
        return _as_ipvsadm(result)
    write(1, scanstring(result.decode(), 1)[0].encode("utf-8", "backslashreplace"))
    return 0


def _as_ipvsadm(result: bytes) -> int:
    """Write what ipvsadm would have written, and return the status it would have had."""
    import json

    answer = json.loads(result)
    write(1, answer["stdout"].encode("utf-8", "backslashreplace"))
    write(2, answer["stderr"].encode("utf-8", "backslashreplace"))
    return int(answer["status"])


class _Bar:
    """Shows how far a restore is."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def show(self, progress: Any) -> None:
        if isinstance(progress, dict):
            self._line.show({"step": f"restoring: {progress.get('done')} of {progress.get('total')} rules"})


def _rules(path: str) -> bytes:
    from kata_shim.cli.document import read_bounded

    name = "stdin" if path == "-" else path
    data = read_bounded(path, name)
    try:
        return _quoted(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise invalid(f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8") from None


def _quoted(text: str) -> bytes:
    return encode_basestring(text).encode("utf-8", "backslashreplace")
