"""The agent's calls on containers, the shim's end, one method per call. The guest's answers are untrusted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kata_shim.agent import Agent
from kata_shim.config import Hypervisor
from kata_shim.contract.oci import SANDBOX_SHM
from kata_shim.errors import invalid
from kata_shim.protos import agent_pb2, oci_pb2
from kata_shim.protos.services import AGENT_SERVICE
from kata_shim.ttrpc.client import Client

RUNTIME_TIMEOUT = 60.0  # seconds for what takes a process in the guest
CHUNK = 768 << 10  # bytes asked for at a time; an answer has 1 MiB at most
AHEAD = 1  # pieces for a stdin that may be on their way while the guest takes another

SHARED_TAG = "kataShared"  # of the machine's file system, as Kata's is called

_M = TypeVar("_M", bound=Message)


def shared_files(directory: str, hypervisor: Hypervisor) -> agent_pb2.Storage:
    """Return what has the guest mount the machine's shared files."""
    driver, fstype, options = "virtio-fs", "virtiofs", []
    if hypervisor.shared_fs == "virtio-9p":
        driver = fstype = "9p"
        options = ["trans=virtio", "version=9p2000.L", "cache=mmap", f"msize={hypervisor.msize_9p}"]
    return agent_pb2.Storage(
        driver=driver, source=SHARED_TAG, fstype=fstype, mount_point=directory, options=[*options, "nodev"]
    )


def disk(
    driver: str, source: str, directory: str, fstype: str, options: Sequence[str], patience: float
) -> agent_pb2.Storage:
    """Return what has the guest wait for a disk, `patience` seconds, and mount it."""
    return agent_pb2.Storage(
        driver=driver,
        driver_options=[f"hotplug_timeout={patience}"],
        source=source,
        fstype=fstype,
        options=options,
        mount_point=directory,
    )


class Containers:
    """The containers in one guest."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def share(
        self, sandbox_id: str, files: agent_pb2.Storage, *, shm: int, guest_hook_path: str
    ) -> None:
        """Have the guest mount the machine's shared `files`, and a /dev/shm of `shm` bytes for pods."""
        storages = [
            files,
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                mount_point=SANDBOX_SHM,
                options=["nosuid", "noexec", "nodev", "mode=1777", f"size={shm}"],
            ),
        ]
        request = agent_pb2.CreateSandboxRequest(
            hostname=sandbox_id, sandbox_id=sandbox_id, storages=storages, guest_hook_path=guest_hook_path
        )
        await self._call("CreateSandbox", request, RUNTIME_TIMEOUT)

    async def create(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        sandbox_pidns: bool,
        storages: Sequence[agent_pb2.Storage] = (),
        patience: float = 0.0,
    ) -> None:
        """Create a container, up to where its first process, of the same exec id, would begin.

        The guest waits up to `patience` seconds for its storages.
        """
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,
            OCI=from_json(oci_pb2.Spec, spec, "config.json"),
            sandbox_pidns=sandbox_pidns,
            storages=storages,
        )
        await self._call("CreateContainer", request, RUNTIME_TIMEOUT + patience)

    async def start(self, container_id: str) -> None:
        """Let the first process begin."""
        request = agent_pb2.StartContainerRequest(container_id=container_id)
        await self._call("StartContainer", request, RUNTIME_TIMEOUT)

    async def exec(self, container_id: str, exec_id: str, process: dict[str, Any]) -> None:
        """Start one more process."""
        request = agent_pb2.ExecProcessRequest(
            container_id=container_id,
            exec_id=exec_id,
            process=from_json(oci_pb2.Process, process, "process"),
        )
        await self._call("ExecProcess", request, RUNTIME_TIMEOUT)

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        """Send a signal to a process, or with "" to all of the container."""
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=number)
        await self._call("SignalProcess", request)

    async def wait(self, container_id: str, exec_id: str) -> int:
        """Wait for a process's end; return its exit code, or 128 + signal."""
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        answer = await self._call("WaitProcess", request, None)
        assert isinstance(answer, agent_pb2.WaitProcessResponse)
        return answer.status & 0xFF

    async def remove(self, container_id: str) -> None:
        """Kill what is left of a container, and forget it."""
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self._call("RemoveContainer", request, RUNTIME_TIMEOUT)

    async def update(self, container_id: str, resources: dict[str, Any]) -> None:
        """Change a container's limits."""
        limits = from_json(oci_pb2.LinuxResources, resources, "resources")
        request = agent_pb2.UpdateContainerRequest(container_id=container_id, resources=limits)
        await self._call("UpdateContainer", request, RUNTIME_TIMEOUT)

    async def stats(self, container_id: str) -> agent_pb2.CgroupStats:
        """Return what a container uses."""
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        answer = await self._call("StatsContainer", request)
        assert isinstance(answer, agent_pb2.StatsContainerResponse)
        return answer.cgroup_stats

    async def pause(self, container_id: str) -> None:
        """Freeze all processes."""
        await self._call("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id))

    async def resume(self, container_id: str) -> None:
        """Let all processes go on."""
        await self._call("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id))

    async def read(self, stream: str, container_id: str, exec_id: str) -> bytes:
        """Return what a process wrote to "stdout" or "stderr"; waits for it; b"" at the end."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=CHUNK)
        answer = await self._call(f"Read{stream.capitalize()}", request, None)
        assert isinstance(answer, agent_pb2.ReadStreamResponse)
        return answer.data

    def stdin(self, container_id: str, exec_id: str) -> Stdin:
        """Return what leads to a process's stdin."""
        return Stdin(self._agent, container_id, exec_id)

    async def resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        """Set the size of a process's terminal."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._call("TtyWinResize", request)

    async def oom_event(self) -> str:
        """Return the next container of which the guest's kernel has killed a process for want of memory."""
        answer = await self._call("GetOOMEvent", agent_pb2.GetOOMEventRequest(), None)
        assert isinstance(answer, agent_pb2.OOMEvent)
        return answer.container_id

    async def _call(self, method: str, request: Message, timeout: float | None = 15.0) -> Message:
        return await self._agent.call(AGENT_SERVICE, method, request, timeout)


class Stdin:
    """The way to a process's stdin. A piece is sent before the last one's answer: the guest need not wait."""

    def __init__(self, agent: Agent, container_id: str, exec_id: str) -> None:
        self._agent = agent
        self._ids = {"container_id": container_id, "exec_id": exec_id}
        self._unanswered: deque[asyncio.Task[Message]] = deque()
        # By which all the unanswered went: what follows a lost piece must not go by the next one.
        self._channel: Client | None = None

    async def write(self, data: bytes) -> None:
        """Send it, once all but AHEAD pieces are taken. Raises ShimError, which may be an earlier piece's."""
        await self._answered(AHEAD if self._agent.keeps_order else 0)
        if not self._unanswered:
            self._channel = await self._agent.channel()
        request = agent_pb2.WriteStreamRequest(**self._ids, data=data)
        call = self._agent.call(AGENT_SERVICE, "WriteStdin", request, None, self._channel)
        self._unanswered.append(asyncio.ensure_future(call))

    async def close(self) -> None:
        """Close the process's stdin when it has taken all."""
        await self._answered(0)
        await self._agent.call(AGENT_SERVICE, "CloseStdin", agent_pb2.CloseStdinRequest(**self._ids))

    def abandon(self) -> None:
        """Wait for no answer any more."""
        for call in self._unanswered:
            call.cancel()
            call.add_done_callback(_heard)
        self._unanswered.clear()

    async def _answered(self, most: int) -> None:
        """Wait until at most so many pieces are unanswered."""
        while self._unanswered and (len(self._unanswered) > most or self._unanswered[0].done()):
            await self._unanswered[0]
            self._unanswered.popleft()


def _heard(call: asyncio.Task[Message]) -> None:
    if not call.cancelled():
        call.exception()


def from_json(kind: type[_M], value: object, where: str) -> _M:
    """Return a message, its fields taken by their names from JSON; what it has no field for is left out.

    Raises ShimError `invalid-argument` that names the field.
    """
    if not isinstance(value, dict):
        raise invalid(f"{where}: not an object")
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        given = value.get(field.name)
        if given is None:
            continue
        place = f"{where}: {field.name}"
        try:
            _set(message, field.name, field.message_type, given, place)
        except (TypeError, ValueError, AttributeError):
            raise invalid(f"{place}: {str(given)[:80]!a} is not of its type") from None
    return message


def _set(message: Message, name: str, kind: Any, given: Any, place: str) -> None:
    if kind is None:
        if isinstance(given, list):
            getattr(message, name).extend(given)
        else:
            setattr(message, name, given)
    elif kind.GetOptions().map_entry:
        getattr(message, name).update({key: str(one) for key, one in given.items()})
    elif isinstance(given, list):
        getattr(message, name).extend(from_json(GetMessageClass(kind), one, place) for one in given)
    else:
        getattr(message, name).CopyFrom(from_json(GetMessageClass(kind), given, place))
