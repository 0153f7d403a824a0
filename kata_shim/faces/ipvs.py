"""kata-ipvs on the JSON-lines wire: its documented stdout is made here, and ipvsadm's own for its dialect."""

from __future__ import annotations

from kata_shim.contract.ipvs import parse_cleanup, parse_parameters, parse_rules
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.fields import field
from kata_shim.faces.jsonl import Call, Handler
from kata_shim.ipvs import usage
from kata_shim.ipvs.command import STATUS_FAILED, Command, UsageError, Verb
from kata_shim.ipvs.language import parse
from kata_shim.quoting import quoted
from kata_shim.sandbox.ipvs import Ipvs, RefusedError
from kata_shim.sandbox.sandbox import Sandbox

DOCUMENTED = "documented"
IPVSADM = "ipvsadm"
STATUS_LIST = 1  # of ipvsadm where it cannot list


def methods(sandbox: Sandbox) -> dict[str, Handler]:
    """Return kata-ipvs's methods, bound to `sandbox`."""
    commands = _Commands(sandbox)
    return {
        "kata-ipvs.ipvsadm": commands.ipvsadm,
        "kata-ipvs.restore": commands.restore,
        "kata-ipvs.cleanup": commands.cleanup,
    }


async def _parse(words: list[str], ipvs: Ipvs) -> Command:
    """Return the command; names are asked for only where numbers alone make none."""
    try:
        return parse(words)
    except UsageError as error:
        if "address" not in error.text and "mask" not in error.text:
            raise
    return parse(words, await ipvs.names())


class _Commands:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def ipvsadm(self, call: Call) -> object:
        dialect, text = field(call, "dialect", str, DOCUMENTED), field(call, "parameters", str, "")
        if dialect == IPVSADM:
            stdout, stderr, status = await self._as_ipvsadm(text.split())
            return {"stdout": stdout, "stderr": stderr, "status": status}
        if dialect != DOCUMENTED:
            raise invalid(f"dialect: {quoted(dialect)} is neither {DOCUMENTED} nor {IPVSADM}")
        command = parse_parameters(text)
        ipvs = await self._sandbox.ipvs()
        if command.verb is Verb.LIST:
            return await ipvs.listing(command)
        await ipvs.change(command, limited=True)
        return ""

    async def _as_ipvsadm(self, words: list[str]) -> tuple[str, str, int]:
        """Do what ipvsadm does with a command line; return its stdout, stderr and status."""
        ipvs = await self._sandbox.ipvs()
        try:
            command = await _parse(words, ipvs)
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

    async def restore(self, call: Call) -> object:
        rules = parse_rules(field(call, "rules", str, ""))
        if not rules:
            raise invalid("rules: there are none to restore")

        async def tell(done: int, total: int) -> None:
            await call.progress({"done": done, "total": total})

        ipvs = await self._sandbox.ipvs()
        try:
            await ipvs.restore([rule.command for rule in rules], tell)
        except RefusedError as error:
            line = rules[error.index].line
            raise ShimError(error.code, f"line {line}: {error.message}", line=line) from None
        return ""

    async def cleanup(self, call: Call) -> object:
        cleanup = parse_cleanup(field(call, "parameters", str, ""))
        deleted = await (await self._sandbox.ipvs()).cleanup(cleanup)
        return f"{deleted} flow entries have been deleted.\n"
