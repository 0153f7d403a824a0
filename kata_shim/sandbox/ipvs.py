"""kata-ipvs: the IPVS table of one sandbox's guest. What changes it is whole or leaves nothing behind.

There is no copy of the table: each answer is the kernel's own. What a change of many rules would destroy is
kept in a file until the change is whole, so that a shim killed meanwhile is mended by the next one. What a
guest that stands still leaves half done is taken back as soon as it answers, and before anything is listed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import orjson

from kata_shim import log
from kata_shim.contract.ipvs import MAX_RULES
from kata_shim.errors import ShimError
from kata_shim.ipvs import connections, listing, plan
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.names import NUMERIC
from kata_shim.ipvs.plan import Table
from kata_shim.ipvs.rules import ServiceState
from kata_shim.qemu.monitor import run_to_end
from kata_shim.sandbox.guest_kernel import GuestKernel, RefusedError, Tell
from kata_shim.sandbox.record import write_whole

# What may pass: the guest stands still, or its agent is being started again.
_NOT_NOW = {"deadline-exceeded", "unavailable", "data-loss"}
WAY_OUT = "--dialect ipvsadm --parameters -C clears the table, whatever is in it"
TRIES = 10  # after a channel that has ended, or answers that are none
PAUSE = 1.0  # seconds between them
# Views that are not told in short.
_IN_FULL = {"stats", "rate", "thresholds", "persistent-conn", "tun-info"}


class Ipvs:
    """The operations on one guest's table."""

    def __init__(self, kernel: GuestKernel, before: Path) -> None:
        """Work on `kernel`; the file `before` holds the rules to go back to while a change is not whole."""
        self.kernel = kernel
        self._before = before
        self._changing = asyncio.Lock()
        self._cut = before.exists()  # whether a change has ended that is still to be taken back
        self._waiting: asyncio.Task[None] | None = None

    async def reconcile(self) -> None:
        """After re-attach: take back a change that was cut; if not now, then when the guest answers."""
        try:
            await self._be_whole()
        except ShimError as error:
            log.warning("a cut change of IPVS rules stays for now", error=error.message)

    async def close(self) -> None:
        """Wait for the guest no more; what is still to be taken back is the next shim's."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait([self._waiting])

    async def change(self, command: Command, *, limited: bool) -> None:
        """Do one command; raises RefusedError.

        If `limited`, `resource-exhausted` is raised beyond the documents' most rules.
        """
        async with self._changing:
            if command.verb is Verb.CLEAR:  # whatever there was before: the way out of any trouble with that
                await run_to_end(_told(self.kernel.do(command)))
                self._settled()
                return
            await self._mend()
            if limited and command.verb in (Verb.ADD_SERVICE, Verb.ADD_SERVER):
                count = await self.kernel.count()
                if count >= MAX_RULES:
                    raise _too_many(f"the guest has {count}")
            await run_to_end(_told(self.kernel.do(command)))

    async def fill(self, commands: Sequence[Command], tell: Tell) -> None:
        """Do rules on an empty table; on any failure it is empty again.

        `tell` is called with how many are done, and of how many. Raises `failed-precondition` for a table
        that is not empty, and RefusedError with the rule's index.
        """
        async with self._changing:
            await self._mend()
            if count := await self.kernel.count():
                raise ShimError(
                    "failed-precondition", f"the guest has IPVS rules ({count}); delete them before restoring"
                )
            await self._whole_or_gone({}, commands, tell)

    async def apply(self, commands: Sequence[Command], tell: Tell) -> None:
        """Do rules on whatever table there is; on any failure it has the rules it had. Else as `fill`."""
        async with self._changing:
            await self._mend()
            await self._whole_or_gone(plan.of_states(await self.kernel.services()), commands, tell)

    async def replace(self, want: Table, tell: Tell, *, dry: bool) -> list[Command]:
        """Make the table `want` by the fewest changes, and return them; if `dry`, only return them.

        Services that stay keep their connections and counters. On any failure the table has the rules it had.
        An earlier change that was cut is taken back first, also if `dry`.
        """
        size = sum(1 + len(entry.servers) for entry in want.values())
        if size > MAX_RULES:
            raise _too_many(f"there would be {size}")
        async with self._changing:
            await self._mend()
            have = plan.of_states(await self.kernel.services())
            changes = plan.changes(have, want)
            if changes and not dry:
                await self._whole_or_gone(have, changes, tell)
        return changes

    async def listing(self, command: Command) -> str:
        """Return what `ipvsadm --list` prints, with each of its options, or `--save`; raises RefusedError."""
        given, kernel = command.given, self.kernel
        await self._be_whole_if_can()
        names = NUMERIC if "numeric" in given else await kernel.names()
        if command.verb is Verb.SAVE:
            return "".join(listing.saved(await kernel.services(), names))
        if command.service is not None:
            (state,) = await kernel.services(command.service.key)
            return "".join(listing.one_service(state, given, names))
        if "connection" in given:
            return "".join(connections.table(await kernel.connections(), given, names))
        if "timeout" in given:
            return listing.timeouts(await kernel.timeouts())
        if "daemon" in given:
            return listing.daemons(await kernel.daemons())
        states = await (kernel.services() if given & _IN_FULL else kernel.services_in_short())
        return "".join(listing.table(await kernel.info(), states, given, names))

    async def states(self, command: Command) -> list[ServiceState]:
        """Return what `ipvsadm --list` of services is made of; raises RefusedError."""
        await self._be_whole_if_can()
        return await self.kernel.services(command.service.key if command.service is not None else None)

    async def _whole_or_gone(self, have: Table, commands: Sequence[Command], tell: Tell) -> None:
        """Do commands, or go back to the table that there is."""
        write_whole(self._before, orjson.dumps(plan.to_json(have)))
        try:
            await self.kernel.load(commands, tell)
        except BaseException:
            self._cut = True
            await run_to_end(self._mend())
            raise
        self._settled()

    async def _be_whole(self) -> None:
        """Take back what was cut; a change that is under way is not waited for."""
        if self._cut:
            async with self._changing:
                await self._mend()

    async def _be_whole_if_can(self) -> None:
        try:
            await self._be_whole()
        except ShimError as error:
            log.warning("IPVS rules are listed that a cut change has left", error=error.message)

    async def _mend(self) -> None:
        """Go back to the table before a change that is not whole; if the guest is silent, when it answers."""
        try:
            await self._go_back()
        except ShimError as error:
            if error.code not in _NOT_NOW:
                raise
            if self._waiting is None or self._waiting.done():
                self._waiting = asyncio.create_task(self._mend_when_answered())
            text = f"{error.message}; a change that was cut is taken back as soon as the guest answers"
            raise ShimError(error.code, text) from None

    async def _mend_when_answered(self) -> None:
        tries = TRIES
        while self._cut:
            try:
                await self.kernel.count()
                async with self._changing:
                    await self._go_back()
            except ShimError as error:
                tries -= error.code != "deadline-exceeded"
                if error.code not in _NOT_NOW or not tries:
                    log.warning("a cut change of IPVS rules stays for now", error=error.message)
                    return
                await asyncio.sleep(PAUSE)  # an answer that is none may have come at once

    async def _go_back(self) -> None:
        try:
            want = plan.from_json(orjson.loads(self._before.read_bytes()))
        except FileNotFoundError:
            self._cut = False
            return
        except (TypeError, ValueError) as error:
            text = f"{self._before}: not a table of this version: {error}; {WAY_OUT}"
            raise ShimError("failed-precondition", text) from None
        log.info("taking back a change of IPVS rules", services=len(want))
        try:
            if want:
                have = plan.of_states(await self.kernel.services())
                await self.kernel.load(plan.changes(have, want), _tell_nobody)
            else:
                await self.kernel.do(Command(Verb.CLEAR))
        except RefusedError as error:
            text = f"an earlier change cannot be taken back: {error.message}; {WAY_OUT}"
            raise ShimError("aborted", text) from None
        self._settled()

    def _settled(self) -> None:
        self._before.unlink(missing_ok=True)
        self._cut = False


async def _told(change: Coroutine[Any, Any, None]) -> None:
    """Do one change of the guest's kernel; where no answer comes, the error says what that means."""
    try:
        await change
    except ShimError as error:
        if error.code not in ("deadline-exceeded", "data-loss"):
            raise
        text = f"{error.message}; whether the change was made, or still will be, is not known"
        raise ShimError(error.code, text) from None


async def _tell_nobody(done: int, total: int) -> None:
    pass


def _too_many(what: str) -> ShimError:
    return ShimError("resource-exhausted", f"{what} IPVS rules; {MAX_RULES} are the limit")
