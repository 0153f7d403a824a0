"""What the guest's kernel is told, and what it tells, of IPVS and of connection tracking.

Messages are made and read here, the agent only relays them. What comes back is a guest's, and not trusted.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from typing import TypeVar

from kata_shim.agent import Agent
from kata_shim.contract.ipvs import Cleanup
from kata_shim.errors import ShimError
from kata_shim.ipvs import connections, conntrack, failure, netlink, proctable, wire
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.connections import Connection
from kata_shim.ipvs.names import FileNames
from kata_shim.ipvs.netlink import Answer, WireError
from kata_shim.ipvs.rules import Daemon, Info, Key, ServerState, ServiceState, Timeouts
from kata_shim.ipvs.wire import Op
from kata_shim.qemu.monitor import run_to_end

CHUNK = 2048  # rules in one message to the guest, during which its agent does nothing else
FIRST = 512  # rules in the first, for which the guest waits
IN_FLIGHT = 2  # chunks: while the guest works on one the next is made
FLOWS = 256  # conntrack entries in one message, each of which is acknowledged
MAX_SAID = 24 << 20  # bytes; three times what the documents' most rules take
MAX_NAMES = 1 << 20  # bytes of a file

_PROC = "ip_vs"
_CONNECTIONS = "ip_vs_conn"
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


class GuestKernel:
    """The kernel of one guest, reached by its agent."""

    def __init__(self, agent: Agent) -> None:
        """Reach it by `agent`."""
        self._agent = agent
        self._family = 0

    async def do(self, command: Command) -> None:
        """Do one command; raises RefusedError."""
        await self._send([(0, command)], await self._number())

    async def load(self, commands: Sequence[Command], tell: Tell) -> None:
        """Do commands, many at a time; raises RefusedError, and then any of the others may have been done.

        `tell` is called with how many are done, and of how many. What was sent is done when this ends.
        """
        family, total, done = await self._number(), len(commands), 0
        waiting: list[asyncio.Task[int]] = []
        rest = enumerate(commands)
        try:
            while True:
                while len(waiting) < IN_FLIGHT and (chunk := list(islice(rest, CHUNK if waiting else FIRST))):
                    waiting.append(asyncio.create_task(self._send(chunk, family)))
                if not waiting:
                    return
                await asyncio.wait(waiting[:1])
                done += waiting.pop(0).result()
                await tell(done, total)
        finally:
            # What has been sent the kernel does; undoing it must come after that.
            if waiting:
                await asyncio.wait(waiting)
            for task in waiting:
                if not task.cancelled():
                    task.exception()  # which is not the first, and so nobody's

    async def count(self) -> int:
        """Return how many services and servers there are."""
        lines = await self._agent.count_table(_PROC)
        return max(0, lines - proctable.HEADINGS)

    async def services(self, key: Key | None = None) -> list[ServiceState]:
        """Return all services, or one, with all that is known of them; raises RefusedError for none."""
        return await self._with_servers(await self._services(key))

    async def services_in_short(self) -> list[ServiceState]:
        """Return all services with what of their servers is shown by default, which is told much sooner."""
        states = await self._services()
        servers = _checked(proctable.read, await self._agent.read_table(_PROC, MAX_SAID))
        known = [state._replace(servers=servers.get(state.service.key, ())) for state in states]
        unknown = [state for state in known if state.service.key not in servers]
        found = {state.service.key: state for state in await self._with_servers(unknown)}
        return [found.get(state.service.key, state) for state in known]

    async def info(self) -> Info:
        """Return the kernel's version of IPVS."""
        return await self._one(Op.GET_INFO, wire.read_info)

    async def timeouts(self) -> Timeouts:
        """Return the timeouts of connections."""
        return await self._one(Op.GET_TIMEOUT, wire.read_timeouts)

    async def daemons(self) -> list[Daemon]:
        """Return the synchronisation daemons that run."""
        family = await self._number()
        running = []
        for answer in await self._dump([wire.request(Op.GET_DAEMON, family, 1)]):
            if answer.errno:
                raise RefusedError(Verb.LIST, answer.errno)
            if answer.kind == family:
                running.append(_checked(wire.read_daemon, answer.body))
        return running

    async def connections(self) -> list[Connection]:
        """Return the connections that IPVS knows."""
        said = BytesIO(await self._agent.read_table(_CONNECTIONS, MAX_SAID))
        lines = (line.decode(errors="replace").rstrip("\n") for line in said)
        return [known for line in lines if (known := connections.read(line)) is not None]

    async def names(self) -> FileNames:
        """Return who knows the names of hosts and services in the guest."""
        hosts, services = await asyncio.gather(*(self._file(name) for name in ("hosts", "services")))
        return FileNames(hosts.decode(errors="replace"), services.decode(errors="replace"))

    async def _file(self, name: str) -> bytes:
        """Return a file that only makes names of numbers: one that is too long makes none."""
        try:
            return await self._agent.read_table(name, MAX_NAMES)
        except ShimError as error:
            if error.code != "data-loss":
                raise
            return b""

    async def delete_flows(self, cleanup: Cleanup) -> int:
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
        while chunk := list(islice(entries, FLOWS)):
            messages = b"".join(conntrack.delete(entry, address, index) for index, entry in chunk)
            for answer in await run_to_end(self._ask([messages], conntrack.PROTOCOL)):
                if answer.errno not in (0, errno.ENOENT):
                    raise ShimError("internal", f"a conntrack entry: {os.strerror(answer.errno)}")
                deleted += answer.errno == 0
        return deleted

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
                self._family = 0  # which ENOENT may mean: it is another once the module was loaded anew
                raise RefusedError(verbs[index], answer.errno, index)
            acknowledged = acknowledged or index == last
        if not acknowledged:
            raise ShimError("data-loss", "the guest's kernel does not say what became of a command")
        return len(chunk)

    async def _services(self, key: Key | None = None) -> list[ServiceState]:
        family = await self._number()
        states = []
        asked = [wire.request(Op.GET_SERVICE, family, 1, key)]
        for answer in await (self._dump(asked) if key is None else self._ask(asked)):
            if answer.errno:
                self._family = 0
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
        for answer in await self._dump(asked):
            index = answer.sequence - 1
            if answer.errno:
                raise RefusedError(Verb.LIST, answer.errno)
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

    async def _number(self) -> int:
        """Return the number that IPVS has in the guest's kernel, which loads the module if need be."""
        if not self._family:
            for answer in await self._ask([wire.family_request(1)]):
                if answer.errno:
                    raise ShimError("failed-precondition", "the guest's kernel has no IPVS")
                if answer.kind >= netlink.NLMSG_MIN_TYPE:
                    self._family = _checked(wire.read_family, answer.body)
        return self._family

    async def _dump(self, messages: list[bytes]) -> list[Answer]:
        """Ask for dumps, numbered from 1; raises `data-loss` unless each is told to its end."""
        answers = list(await self._ask(messages))
        ends = (netlink.NLMSG_DONE, netlink.NLMSG_ERROR)
        ended = {answer.sequence for answer in answers if answer.kind in ends}
        if not ended >= set(range(1, len(messages) + 1)):
            raise ShimError("data-loss", "the guest's kernel does not tell its table to the end")
        return answers

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
