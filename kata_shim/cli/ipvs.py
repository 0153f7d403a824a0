"""kata-runtime kata-ipvs: IPVS rules of a running sandbox's guest, in ipvsadm's language."""

from __future__ import annotations

# As the json package uses them; importing that takes longer than all else here.
from _json import encode_basestring, scanstring

from kata_shim import registry, shims
from kata_shim.cli.arguments import UsageError
from kata_shim.cli.terminal import ProgressLine, write
from kata_shim.errors import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kata_shim.cli.arguments import Arguments

# Each command, and its ways: the flag that says what to do, and those that may stand beside it.
COMMANDS: dict[str, dict[str, tuple[str, ...]]] = {
    "ipvsadm": {
        "--parameters": ("--dialect", "--json"),
        "--restore": ("--dialect",),
        "--replace": ("--dry-run",),
    },
    "cleanup": {"--parameters": ()},
}
_METHODS = {"--restore": "restore", "--replace": "replace"}


def ipvs(arguments: Arguments) -> int:
    """Run one kata-ipvs command: `words` are the command and the id."""
    if not arguments.words:
        raise UsageError("which command?")
    command, *words = arguments.words
    if command not in COMMANDS:
        raise UsageError(f"{command}: unknown command")
    if len(words) > 1:
        raise UsageError(f"{command}: unexpected argument {words[1]}")
    way = _way(command, arguments)
    sandbox_id = registry.resolve(arguments.root, words[0] if words else "")
    line = ProgressLine()
    params = _params(way, arguments)
    connection = shims.connect(arguments.root, sandbox_id, line.say)
    try:
        result = connection.call(
            f"kata-ipvs.{_METHODS.get(way, command)}",
            params,
            (lambda progress: line.show(_how_far(progress))) if line.is_shown else None,
        )
    finally:
        line.clear()
    if result.startswith(b'"'):
        write(1, scanstring(result.decode(), 1)[0].encode("utf-8", "backslashreplace"))
        return 0
    if arguments.has("--json"):
        write(1, result + b"\n")
        return 0
    return _as_ipvsadm(result)


def _way(command: str, arguments: Arguments) -> str:
    """Return the flag that says what to do; raises UsageError."""
    ways = COMMANDS[command]
    given = [flag for flag in ways if arguments.has(flag)]
    if len(given) != 1:
        raise UsageError(f"{command}: one of {', '.join(ways)} is needed")
    for flag in ("--parameters", "--restore", "--replace", "--dialect", "--json", "--dry-run"):
        if arguments.has(flag) and flag != given[0] and flag not in ways[given[0]]:
            raise UsageError(f"{command}: {flag} does not go with {given[0]}")
    return given[0]


def _params(way: str, arguments: Arguments) -> bytes:
    """Return the params of a request."""
    if way == "--parameters":
        params = b'{"parameters":%b' % _quoted(arguments.last(way))
    else:
        params = b'{"rules":%b' % _rules(arguments.last(way))
    if arguments.has("--dialect"):
        params += b',"dialect":%b' % _quoted(arguments.last("--dialect"))
    for flag, name in (("--json", b"json"), ("--dry-run", b"dry_run")):
        if arguments.has(flag):
            params += b',"%b":true' % name
    return params + b"}"


def _as_ipvsadm(result: bytes) -> int:
    """Write what ipvsadm would have written, and return the status it would have had."""
    import json

    answer = json.loads(result)
    write(1, answer["stdout"].encode("utf-8", "backslashreplace"))
    write(2, answer["stderr"].encode("utf-8", "backslashreplace"))
    return int(answer["status"])


def _how_far(progress: Any) -> dict[str, str]:
    """Return a restore's progress as a line shows it."""
    done, total = (progress.get(name) if isinstance(progress, dict) else "?" for name in ("done", "total"))
    return {"step": f"restoring: {done} of {total} rules"}


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
