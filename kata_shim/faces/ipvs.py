"""kata-ipvs on the JSON-lines wire: its documented stdout is made here, and ipvsadm's own for its dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kata_shim.contract.ipvs import (
    Rule,
    parse_cleanup,
    parse_parameters,
    parse_plain,
    parse_rules,
    rule_lines,
)
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.fields import field
from kata_shim.faces.jsonl import Call, Handler
from kata_shim.ipvs import listing, plan, usage
from kata_shim.ipvs.command import STATUS_FAILED, Command, UsageError, Verb
from kata_shim.ipvs.language import parse
from kata_shim.ipvs.names import FileNames
from kata_shim.quoting import quoted
from kata_shim.sandbox.guest_kernel import RefusedError, Tell
from kata_shim.sandbox.ipvs import Ipvs
from kata_shim.sandbox.sandbox import Sandbox

DIALECTS = ("documented", "ipvsadm")
MAX_LINES = 100_000  # of a file in ipvsadm's dialect
BREATH = 256  # lines after which others have their turn
STATUS_LIST = 1  # of ipvsadm where it cannot list
# What can be taken back, and so stands in a file to restore.
RESTORED = frozenset(
    {
        Verb.ADD_SERVICE,
        Verb.EDIT_SERVICE,
        Verb.DELETE_SERVICE,
        Verb.ADD_SERVER,
        Verb.EDIT_SERVER,
        Verb.DELETE_SERVER,
        Verb.CLEAR,
    }
)


def methods(sandbox: Sandbox) -> dict[str, Handler]:
    """Return kata-ipvs's methods, bound to `sandbox`."""
    commands = _Commands(sandbox)
    return {
        "kata-ipvs.ipvsadm": commands.ipvsadm,
        "kata-ipvs.restore": commands.restore,
        "kata-ipvs.replace": commands.replace,
        "kata-ipvs.cleanup": commands.cleanup,
    }


class _Commands:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def ipvsadm(self, call: Call) -> object:
        text, as_json = field(call, "parameters", str, ""), field(call, "json", bool, False)
        ipvs = await self._sandbox.ipvs()
        if _is_ipvsadm(call) and not as_json:
            stdout, stderr, status = await _as_ipvsadm(text.split(), ipvs)
            return {"stdout": stdout, "stderr": stderr, "status": status}
        if _is_ipvsadm(call):
            return await _listed_as_json(await _of_ipvsadm(text.split(), _Parser(ipvs)), ipvs)
        command = parse_parameters(text)
        if as_json:
            return await _listed_as_json(command, ipvs)
        if command.verb is Verb.LIST:
            return await ipvs.listing(command)
        await ipvs.change(command, limited=True)
        return ""

    async def restore(self, call: Call) -> object:
        text, ipvs = field(call, "rules", str, ""), await self._sandbox.ipvs()
        call.takes_much = True  # the whole table, to go back to
        if _is_ipvsadm(call):
            if rules := await _rules_of_ipvsadm(text, ipvs):
                await _load(rules, ipvs.apply, call)
        else:
            await _load(parse_rules(text), ipvs.fill, call)
        return ""

    async def replace(self, call: Call) -> object:
        dry, text = field(call, "dry_run", bool, False), _text(call, "rules")
        if text is None:
            raise invalid("rules: missing; an empty text means no rules at all")
        ipvs = await self._sandbox.ipvs()
        call.takes_much = True  # the whole table, to compare with
        rules = await _rules_of_ipvsadm(text, ipvs)
        try:
            want = plan.of_rules(rule.command for rule in rules)
        except plan.PlanError as error:
            raise _of_line(invalid(str(error)), rules[error.index].line) from None
        changes = await ipvs.replace(want, _teller(call), dry=dry)
        return "".join(map(listing.rule, changes)) if dry else ""

    async def cleanup(self, call: Call) -> object:
        cleanup = parse_cleanup(field(call, "parameters", str, ""))
        call.takes_much = True  # all connections
        deleted = await (await self._sandbox.ipvs()).kernel.delete_flows(cleanup)
        return f"{deleted} flow entries have been deleted.\n"


async def _as_ipvsadm(words: list[str], ipvs: Ipvs) -> tuple[str, str, int]:
    """Do what ipvsadm does with a command line; return its stdout, stderr and status."""
    try:
        command = await _Parser(ipvs).parse(words)
        match command.verb:
            case Verb.HELP:
                return usage.help_text(), "", 0
            case Verb.VERSION:
                return usage.VERSION, "", 0
            case Verb.RESTORE:
                raise UsageError("rules are restored by --restore FILE or --restore -")
            case Verb.LIST | Verb.SAVE:
                return await ipvs.listing(command), "", 0
        await ipvs.change(command, limited=False)
    except UsageError as error:
        return "", f"{error.text}\n", error.status
    except RefusedError as error:
        status = STATUS_LIST if error.verb is Verb.LIST else STATUS_FAILED
        return "", f"{error.message}\n", status
    return "", "", 0


async def _listed_as_json(command: Command, ipvs: Ipvs) -> object:
    if command.verb is not Verb.LIST or command.given & {"connection", "timeout", "daemon"}:
        raise invalid("json: only for a list of services")
    return listing.as_json(await ipvs.states(command), command.given)


class _Parser:
    """Reads ipvsadm's lines. Names are asked for once, and only where numbers alone make no command."""

    def __init__(self, ipvs: Ipvs) -> None:
        self._ipvs = ipvs
        self._names: FileNames | None = None

    async def parse(self, words: list[str]) -> Command:
        """Return the command; raises UsageError."""
        try:
            return parse(words)
        except UsageError as error:
            if "address" not in error.text and "mask" not in error.text:
                raise
        if self._names is None:
            self._names = await self._ipvs.kernel.names()
        return parse(words, self._names)


async def _of_ipvsadm(words: list[str], parser: _Parser) -> Command:
    """Return the command; raises ShimError."""
    try:
        return await parser.parse(words)
    except UsageError as error:
        raise invalid(error.text.rstrip()) from None


async def _rules_of_ipvsadm(text: str, ipvs: Ipvs) -> list[Rule]:
    rules: list[Rule] = []
    parser = _Parser(ipvs)
    for number, words in rule_lines(text):
        try:
            command = parse_plain(words) or await _of_ipvsadm(words, parser)
            if command.verb not in RESTORED:
                raise invalid(f"{command.verb}: it cannot be taken back, so it has no place in a file")
            if len(rules) == MAX_LINES:
                raise invalid(f"more than {MAX_LINES} lines")
        except ShimError as error:
            raise _of_line(error, number) from None
        rules.append(Rule(number, command))
        if len(rules) % BREATH == 0:
            await asyncio.sleep(0)
    return rules


async def _load(
    rules: list[Rule], load: Callable[[Sequence[Command], Tell], Awaitable[None]], call: Call
) -> None:
    """Have all rules done; an error that is one's names its line."""
    if not rules:
        raise invalid("rules: there are none to restore")
    try:
        await load([rule.command for rule in rules], _teller(call))
    except RefusedError as error:
        if error.verb is Verb.LIST:  # before the first of them
            raise
        raise _of_line(error, rules[error.index].line) from None


def _text(call: Call, name: str) -> str | None:
    """Return one of the params, None where it is absent."""
    given = isinstance(call.params, dict) and call.params.get(name) is not None
    return field(call, name, str, "") if given else None


def _teller(call: Call) -> Tell:
    async def tell(done: int, total: int) -> None:
        await call.hint({"done": done, "total": total})

    return tell


def _of_line(error: ShimError, line: int) -> ShimError:
    return ShimError(error.code, f"line {line}: {error.message}", line=line)


def _is_ipvsadm(call: Call) -> bool:
    dialect = field(call, "dialect", str, "documented")
    if dialect not in DIALECTS:
        raise invalid(f"dialect: {quoted(dialect)} is neither {' nor '.join(DIALECTS)}")
    return dialect == "ipvsadm"
