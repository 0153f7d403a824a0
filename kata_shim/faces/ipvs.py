"""kata-ipvs on the JSON-lines wire: its documented stdout is made here, and ipvsadm's own for its dialect."""

from __future__ import annotations

from kata_shim.contract.ipvs import parse_cleanup, parse_parameters, parse_rules
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.fields import field
from kata_shim.faces.jsonl import Call, Handler
from kata_shim.ipvs.command import Verb
from kata_shim.sandbox.ipvs import RefusedError
from kata_shim.sandbox.sandbox import Sandbox


def methods(sandbox: Sandbox) -> dict[str, Handler]:
    """Return kata-ipvs's methods, bound to `sandbox`."""
    commands = _Commands(sandbox)
    return {
        "kata-ipvs.ipvsadm": commands.ipvsadm,
        "kata-ipvs.restore": commands.restore,
        "kata-ipvs.cleanup": commands.cleanup,
    }


class _Commands:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def ipvsadm(self, call: Call) -> object:
        command = parse_parameters(field(call, "parameters", str, ""))
        ipvs = await self._sandbox.ipvs()
        if command.verb is Verb.LIST:
            return await ipvs.listing(command)
        await ipvs.change(command)
        return ""

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
