"""kata-ipvs: the IPVS table of one sandbox's guest. What changes it is whole or leaves nothing behind.

Rules are parsed and compiled here and relayed to the guest's kernel as they are; what the kernel has is read
and printed here. There is no copy of the table: each answer is the kernel's own, and a guest's: not trusted.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from kata_shim import log
from kata_shim.agent import Agent
from kata_shim.contract.ipvs import MAX_RULES, Cleanup
from kata_shim.errors import ShimError
from kata_shim.ipvs import connections, conntrack, failure, listing, netlink, proctable, wire
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.names import FileNames
from kata_shim.ipvs.netlink import Answer, WireError
from kata_shim.ipvs.rules import Daemon, Key, ServerState, ServiceState
from kata_shim.ipvs.wire import Op
from kata_shim.qemu.monitor import run_to_end

CHUNK = 256  # rules in one message to the guest
IN_FLIGHT = 4  # chunks
MAX_SAID = 64 << 20  # bytes; many times what the documents' most rules take
MAX_NAMES = 1 << 20  # bytes of a file

_PROC = "ip_vs"
_CONNECTIONS = "ip_vs_conn"
# Views that /proc/net/ip_vs does not tell of.
_BY_NETLINK = {"stats", "rate", "thresholds", "persistent-conn", "tun-info"}
_CODES = {errno.EEXIST: "already-exists", errno.ENOENT: "not-found", errno.ESRCH: "not-found"}

Tell = Callable[[int, int], Awaitable[None]]
_S = TypeVar("_S")
_T = TypeVar("_T")


class RefusedError(ShimError):
    """The guest's kernel has refused a command: its verb, the error's number, and its place among others."""

    def __init__(self, verb: Verb, number: int, index: int = 0) -> None:
        super().__init__(_CODES.get(number, "invalid-argument"), failure.text(verb, number))
        self.verb = verb
        self.errno = number
        self.index = index


class Ipvs:
    """The operations on one guest's table."""

    def __init__(self, agent: Agent, restoring: Path) -> None:
        """Work on `agent`'s guest; the file `restoring` is there as long as a restore is not whole."""
        self._agent = agent
        self._restoring = restoring
        self._family = 0
        self._changing = asyncio.Lock()

    async def reconcile(self) -> None:
        """After re-attach: take back a restore that was cut; what cannot be now, the next change does."""
        try:
            async with self._changing:
                await self._mend()
        except ShimError as error:
            log.warning("a cut restore of IPVS rules stays for now", error=error.message)

    async def change(self, command: Command, *, limited: bool) -> None:
        """Do one command; raises RefusedError.

        If `limited`, `resource-exhausted` is raised beyond the documents' most rules.
        """
        async with self._changing:
            await self._mend()
            if limited and command.verb in (Verb.ADD_SERVICE, Verb.ADD_SERVER):
                await self._need_room()
            await run_to_end(self._apply([command]))

    async def restore(self, commands: Sequence[Command], tell: Tell) -> None:
        """Make the table that rules say of an empty one; on any failure it is empty again.

        `tell` is called with how many rules are done, and of how many. Raises `failed-precondition` for a
        table that is not empty, and RefusedError with the rule's index.
        """
        async with self._changing:
            await self._mend()
            if count := await self._count():
                raise ShimError(
                    "failed-precondition", f"the guest has {count} IPVS rules; delete them before restoring"
                )
            self._restoring.touch()
            try:
                await self._load(commands, tell)
            except BaseException:
                await run_to_end(self._mend())
                raise
            self._restoring.unlink()

    async def listing(self, command: Command) -> str:
        """Return what `ipvsadm --list` prints, with each of its options, or `--save`; raises RefusedError."""
        given = command.given
        names = listing.NUMERIC if "numeric" in given else await self.names()
        if command.verb is Verb.SAVE:
            return "".join(listing.saved(await self._by_netlink(), names))
        if command.service is not None:
            (state,) = await self._by_netlink(command.service.key)
            return "".join(listing.one_service(state, given, names))
        if "connection" in given:
            lines = (await self._agent.read_table(_CONNECTIONS, MAX_SAID)).decode(errors="replace")
            known = filter(None, map(connections.read, lines.splitlines()))
            return "".join(connections.table(known, given, names))
        if "timeout" in given:
            return listing.timeouts(await self._one(Op.GET_TIMEOUT, wire.read_timeouts))
        if "daemon" in given:
            return listing.daemons([daemon async for daemon in self._daemons()])
        info = await self._one(Op.GET_INFO, wire.read_info)
        states = await (self._by_netlink() if given & _BY_NETLINK else self._by_proc())
        return "".join(listing.table(info, states, given, names))

    async def names(self) -> FileNames:
        """Return who knows the names of hosts and services in the guest."""
        hosts, services = await asyncio.gather(
            *(self._agent.read_table(name, MAX_NAMES) for name in ("hosts", "services"))
        )
        return FileNames(hosts.decode(errors="replace"), services.decode(errors="replace"))

    async def cleanup(self, cleanup: Cleanup) -> int:
        """Delete the conntrack entries first sent to an address by a protocol; return how many there were."""
        address, protocol = cleanup
        found = []
        for answer in await self._ask([conntrack.find(address, protocol, 1)], conntrack.PROTOCOL):
            if answer.errno:
                raise ShimError("internal", f"the guest's conntrack entries: {os.strerror(answer.errno)}")
            if answer.kind >= netlink.NLMSG_MIN_TYPE:
                read = partial(conntrack.read, address=address, protocol=protocol)
                found.append(_checked(read, answer.body))
        entries = enumerate((entry for entry in found if entry is not None), 1)
        deleted = 0
        while chunk := list(islice(entries, CHUNK)):
            messages = b"".join(conntrack.delete(entry, address, index) for index, entry in chunk)
            for answer in await run_to_end(self._ask([messages], conntrack.PROTOCOL)):
                if answer.errno not in (0, errno.ENOENT):
                    raise ShimError("internal", f"a conntrack entry: {os.strerror(answer.errno)}")
                deleted += answer.errno == 0
        return deleted

    async def _need_room(self) -> None:
        count = await self._count()
        if count >= MAX_RULES:
            raise ShimError(
                "resource-exhausted", f"the guest has {count} IPVS rules; {MAX_RULES} are the limit"
            )

    async def _count(self) -> int:
        """Return how many services and servers the kernel has."""
        lines = await self._agent.count_table(_PROC)
        return max(0, lines - proctable.HEADINGS)

    async def _mend(self) -> None:
        """Clear the table of a restore that is not whole: it was empty before."""
        if self._restoring.exists():
            log.info("taking back a restore of IPVS rules")
            await self._apply([Command(Verb.CLEAR)])
            self._restoring.unlink()

    async def _load(self, commands: Sequence[Command], tell: Tell) -> None:
        """Apply the commands in chunks, several of them under way."""
        family, total, done = await self._number(), len(commands), 0
        waiting: list[asyncio.Task[int]] = []
        rest = enumerate(commands)
        try:
            while True:
                while len(waiting) < IN_FLIGHT and (chunk := list(islice(rest, CHUNK))):
                    waiting.append(asyncio.create_task(self._send(chunk, family)))
                if not waiting:
                    return
                done += await waiting[0]
                del waiting[0]
                await tell(done, total)
        finally:
            # What has been sent the kernel does; undoing it must come after that.
            if waiting:
                await asyncio.wait(waiting)

    async def _apply(self, commands: Sequence[Command]) -> None:
        await self._send(list(enumerate(commands)), await self._number())

    async def _send(self, chunk: list[tuple[int, Command]], family: int) -> int:
        """Have the kernel do some commands; return how many. Raises RefusedError for the first refused."""
        last = chunk[-1][0]
        messages = b"".join(
            wire.message(command, family, index + 1, netlink.NLM_F_ACK if index == last else 0)
            for index, command in chunk
        )
        verbs = {index: command.verb for index, command in chunk}
        acknowledged = False
        for answer in await self._ask([messages]):
            index = answer.sequence - 1
            if index not in verbs:
                raise ShimError("data-loss", "the guest's kernel answers to a command that it was not given")
            if answer.errno:
                raise RefusedError(verbs[index], answer.errno, index)
            acknowledged = acknowledged or index == last
        if not acknowledged:
            raise ShimError("data-loss", "the guest's kernel does not say what became of a command")
        return len(chunk)

    async def _by_proc(self) -> list[ServiceState]:
        """Return the services with what of their servers is shown by default."""
        states = await self._services()
        servers = _checked(proctable.read, await self._agent.read_table(_PROC, MAX_SAID))
        known = [state._replace(servers=servers.get(state.service.key, ())) for state in states]
        unknown = [state for state in known if state.service.key not in servers]
        found = {state.service.key: state for state in await self._with_servers(unknown)}
        return [found.get(state.service.key, state) for state in known]

    async def _by_netlink(self, key: Key | None = None) -> list[ServiceState]:
        """Return all services, or one, with all that the kernel tells; raises RefusedError for none."""
        return await self._with_servers(await self._services(key))

    async def _services(self, key: Key | None = None) -> list[ServiceState]:
        family = await self._number()
        states = []
        for answer in await self._ask([wire.request(Op.GET_SERVICE, family, 1, key)]):
            if answer.errno:
                raise RefusedError(Verb.LIST, answer.errno)
            if answer.kind == family:
                states.append(_checked(wire.read_service, answer.body))
        if key is not None and len(states) != 1:
            raise ShimError("data-loss", "the guest's kernel does not answer with the one service asked for")
        return states

    async def _with_servers(self, states: list[ServiceState]) -> list[ServiceState]:
        family = await self._number()
        keys = [state.service.key for state in states]
        servers: list[list[ServerState]] = [[] for _ in states]
        asked = [wire.request(Op.GET_DEST, family, index, key) for index, key in enumerate(keys, 1)]
        for answer in await self._ask(asked):
            index = answer.sequence - 1
            if answer.kind == family and 0 <= index < len(keys):
                read = partial(wire.read_server, family=keys[index].family)
                servers[index].append(_checked(read, answer.body))
        return [state._replace(servers=tuple(found)) for state, found in zip(states, servers, strict=True)]

    async def _one(self, operation: Op, read: Callable[[memoryview], _T]) -> _T:
        """Return what the kernel tells of itself."""
        family = await self._number()
        for answer in await self._ask([wire.request(operation, family, 1)]):
            if answer.kind == family:
                return _checked(read, answer.body)
        raise ShimError("data-loss", f"the guest's kernel does not answer to {operation.name}")

    async def _daemons(self) -> AsyncIterator[Daemon]:
        family = await self._number()
        for answer in await self._ask([wire.request(Op.GET_DAEMON, family, 1)]):
            if answer.errno:
                raise RefusedError(Verb.LIST, answer.errno)
            if answer.kind == family:
                yield _checked(wire.read_daemon, answer.body)

    async def _number(self) -> int:
        """Return the number that IPVS has in the guest's kernel, which loads the module if need be."""
        if not self._family:
            for answer in await self._ask([wire.family_request(1)]):
                if answer.errno:
                    raise ShimError("failed-precondition", "the guest's kernel has no IPVS")
                if answer.kind >= netlink.NLMSG_MIN_TYPE:
                    self._family = _checked(wire.read_family, answer.body)
        return self._family

    async def _ask(self, messages: list[bytes], protocol: int = wire.PROTOCOL) -> Iterator[Answer]:
        pieces = await self._agent.netlink(protocol, messages, MAX_SAID)
        return (answer for piece in pieces for answer in _checked(_read_all, piece))


def _read_all(piece: bytes) -> list[Answer]:
    return list(netlink.read(piece))


def _checked(read: Callable[[_S], _T], said: _S) -> _T:
    """Return what a reader makes of what the guest's kernel said, or says to have said."""
    try:
        return read(said)
    except (WireError, proctable.TableError) as error:
        raise ShimError("data-loss", f"the guest's kernel answers with what it cannot: {error}") from None
