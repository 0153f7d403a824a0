"""The containers of the guest, run by an OCI runtime: the calls of grpc.AgentService that are about them.

    /run/kata-containers/<id>/   config.json   what the runtime was given    runtime.log   what it had to say
    /run/kata-containers/shared/containers/    what the shim shares (storage.py)

A container is known from CreateContainer to RemoveContainer, whatever becomes of its processes or the
channel.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty

from kata_shim.errors import ShimError, invalid
from kata_shim.guest import cgroup, oci, storage
from kata_shim.guest.children import Children
from kata_shim.guest.process import Process
from kata_shim.guest.runtime import Runtime
from kata_shim.guest.sealed import Program
from kata_shim.protos import agent_pb2
from kata_shim.ttrpc import bulk

MAX_CONTAINERS = 256
MAX_PROCESSES = 256  # of one container
MAX_CHUNK = 1 << 20  # bytes of output in one answer

_RUN = "/run/kata-containers"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_SHARED_NAMESPACES = ("ipc", "uts")  # by the containers of a pod
_T = TypeVar("_T")


class Container:
    """One container."""

    def __init__(self, container_id: str, first: str, program: Program, children: Children) -> None:
        self.id = container_id
        self.directory = f"{_RUN}/{container_id}"
        self.first = first  # the exec_id of its first process
        self.processes: dict[str, Process] = {}
        self.cgroup = cgroup.Cgroup(container_id)
        self.runtime = Runtime(program, children, container_id, self.directory)
        self.has_hooks = False
        self.is_going = False
        self.mounted: list[str] = []
        self.closing = ExitStack()

    def process(self, exec_id: str) -> Process:
        """Return a process; raises ShimError `not-found`."""
        found = self.processes.get(exec_id)
        if found is None:
            raise ShimError("not-found", f"exec_id: container {self.id} has no process {exec_id}")
        return found


class Containers:
    """All containers; `runtime` is the OCI runtime, crun or runc."""

    def __init__(self, children: Children, runtime: Program) -> None:
        self._children = children
        self._runtime = runtime
        self._containers: dict[str, Container] = {}
        self._ooms: asyncio.Queue[str] = asyncio.Queue()
        self.hook_path = ""  # a directory of this guest's own hooks

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> Empty:
        """Create a container, up to where its first process would begin."""
        container_id = request.container_id
        if not _ID.fullmatch(container_id):
            raise invalid(f"container_id: {container_id[:128]!a} is not of A-Z a-z 0-9 _ . -")
        if container_id in self._containers:
            raise ShimError("already-exists", f"container_id: {container_id} is in use")
        if len(self._containers) >= MAX_CONTAINERS:
            raise ShimError("resource-exhausted", f"more than {MAX_CONTAINERS} containers")
        container = Container(container_id, request.exec_id or container_id, self._runtime, self._children)
        self._containers[container_id] = container
        await _to_end(self._create(container, request))
        return Empty()

    async def start_container(self, request: agent_pb2.StartContainerRequest) -> Empty:
        """Let the first process begin."""
        container = self._find(request.container_id)
        await _to_end(container.runtime.start(hooks=container.has_hooks))
        return Empty()

    async def exec_process(self, request: agent_pb2.ExecProcessRequest) -> Empty:
        """Start one more process."""
        container = self._find(request.container_id)
        if not _ID.fullmatch(request.exec_id):
            raise invalid(f"exec_id: {request.exec_id[:128]!a} is not of A-Z a-z 0-9 _ . -")
        there = container.processes.get(request.exec_id)
        if there is not None and not there.is_over:
            raise ShimError("already-exists", f"exec_id: {request.exec_id} is in use")
        if there is not None or len(container.processes) >= MAX_PROCESSES:
            self._make_room(container)
        if len(container.processes) >= MAX_PROCESSES:
            raise ShimError("resource-exhausted", f"more than {MAX_PROCESSES} processes in one container")
        await _to_end(self._exec(container, request.exec_id, oci.to_json(request.process)))
        return Empty()

    async def signal_process(self, request: agent_pb2.SignalProcessRequest) -> Empty:
        """Send a signal to one process, or to all of a container."""
        container = self._find(request.container_id)
        if not 1 <= request.signal < signal.NSIG:
            raise invalid(f"signal: {request.signal} is not within 1..{signal.NSIG - 1}")
        if request.exec_id:
            container.process(request.exec_id).signal(request.signal)
        else:
            container.cgroup.signal(request.signal)
        return Empty()

    async def wait_process(self, request: agent_pb2.WaitProcessRequest) -> agent_pb2.WaitProcessResponse:
        """Answer the exit code, or 128 + signal, once the process has ended and what it wrote is read."""
        container = self._find(request.container_id)
        process = container.process(request.exec_id)
        status = await asyncio.shield(process.exited)
        await asyncio.gather(*(pipe.read_up() for pipe in process.streams.output.values()))
        process.waited = True
        self._forget_if_done(container, request.exec_id)
        return agent_pb2.WaitProcessResponse(status=status)

    async def remove_container(self, request: agent_pb2.RemoveContainerRequest) -> Empty:
        """Kill all processes of a container, and forget it when they have ended."""
        container = self._find(request.container_id)
        async with asyncio.timeout(request.timeout or None):
            await _to_end(self._remove(container))
        return Empty()

    async def update_container(self, request: agent_pb2.UpdateContainerRequest) -> Empty:
        """Change a container's resources."""
        container = self._find(request.container_id)
        await _to_end(container.runtime.update(oci.to_json(request.resources)))
        return Empty()

    async def stats_container(
        self, request: agent_pb2.StatsContainerRequest
    ) -> agent_pb2.StatsContainerResponse:
        """Answer what the container's processes use."""
        container = self._find(request.container_id)
        return agent_pb2.StatsContainerResponse(cgroup_stats=container.cgroup.stats())

    async def pause_container(self, request: agent_pb2.PauseContainerRequest) -> Empty:
        """Freeze all processes."""
        await self._find(request.container_id).cgroup.freeze(True)
        return Empty()

    async def resume_container(self, request: agent_pb2.ResumeContainerRequest) -> Empty:
        """Let all processes go on."""
        await self._find(request.container_id).cgroup.freeze(False)
        return Empty()

    @bulk.apart(agent_pb2.WriteStreamRequest.DATA_FIELD_NUMBER)
    async def write_stdin(
        self, request: agent_pb2.WriteStreamRequest, data: bytes | memoryview
    ) -> agent_pb2.WriteStreamResponse:
        """Write to a process's stdin; answers when the pipe or the terminal has taken all of it."""
        stdin = self._process(request).streams.stdin
        assert stdin is not None
        await stdin.write(data)
        return agent_pb2.WriteStreamResponse(len=len(data))

    async def read_stdout(self, request: agent_pb2.ReadStreamRequest) -> bulk.Pieces:
        """Answer what a process wrote, as soon as there is some; empty data is the end."""
        return await self._read(request, "stdout")

    async def read_stderr(self, request: agent_pb2.ReadStreamRequest) -> bulk.Pieces:
        """As `read_stdout`; a process with a terminal has none."""
        return await self._read(request, "stderr")

    async def close_stdin(self, request: agent_pb2.CloseStdinRequest) -> Empty:
        """Close a process's stdin; a terminal stays open."""
        streams = self._process(request).streams
        if streams.terminal < 0 and streams.stdin is not None:
            streams.stdin.close()
        return Empty()

    async def tty_win_resize(self, request: agent_pb2.TtyWinResizeRequest) -> Empty:
        """Set the size of a process's terminal."""
        self._process(request).streams.resize(request.row, request.column)
        return Empty()

    async def get_oom_event(self, _: agent_pb2.GetOOMEventRequest) -> agent_pb2.OOMEvent:
        """Answer the next container of which the kernel has killed a process for want of memory."""
        return agent_pb2.OOMEvent(container_id=await self._ooms.get())

    # Doing it

    async def _create(self, container: Container, request: agent_pb2.CreateContainerRequest) -> None:
        try:
            os.makedirs(container.directory, 0o700)
            container.closing.callback(shutil.rmtree, container.directory, ignore_errors=True)
            for one in request.storages:
                container.mounted.append(await storage.attach(one, self._children))
            spec = oci.to_json(request.OCI)
            self._adapt(spec, container, sandbox_pidns=request.sandbox_pidns)
            spec["hooks"] = _hooks(self.hook_path)
            container.has_hooks = bool(spec["hooks"])
            container.runtime.write("config.json", spec)
            terminal = bool(spec.get("process", {}).get("terminal"))
            container.processes[container.first] = await container.runtime.create(terminal=terminal)
            container.closing.callback(container.cgroup.watch(self._ooms.put_nowait))
        except BaseException:
            await storage.detach(container.mounted)
            del self._containers[container.id]
            container.closing.close()
            raise

    async def _exec(self, container: Container, exec_id: str, process: dict[str, Any]) -> None:
        started = await container.runtime.exec(exec_id, process)
        container.processes[exec_id] = started
        if container.is_going:  # it has been killed, or is now
            started.signal(signal.SIGKILL)
            raise ShimError("not-found", f"container_id: container {container.id} is being removed")

    async def _remove(self, container: Container) -> None:
        container.is_going = True
        with suppress(ShimError):  # it has no control group any more
            container.cgroup.signal(signal.SIGKILL)
        for process in list(container.processes.values()):
            await asyncio.shield(process.exited)
            process.streams.close()
        await container.runtime.delete(hooks=container.has_hooks)
        await container.cgroup.remove()
        await storage.detach(container.mounted)
        self._containers.pop(container.id, None)
        container.closing.close()

    async def _read(self, request: agent_pb2.ReadStreamRequest, stream: str) -> bulk.Pieces:
        """Return a ReadStreamResponse."""
        container, process = self._find(request.container_id), self._process(request)
        pipe = process.streams.output.get(stream)
        data = b"" if pipe is None else await pipe.read(min(request.len or MAX_CHUNK, MAX_CHUNK))
        if not data:
            self._forget_if_done(container, request.exec_id)
        return bulk.message(agent_pb2.ReadStreamResponse.DATA_FIELD_NUMBER, data)

    def _adapt(self, spec: dict[str, Any], container: Container, *, sandbox_pidns: bool) -> None:
        """Make of a specification one for this guest: its cgroups, and the namespaces that a pod shares."""
        linux = spec.setdefault("linux", {})
        linux["cgroupsPath"] = container.cgroup.path
        linux.setdefault("personality", {"domain": "LINUX"})  # not its runtime's (runtime.py)
        first = next(iter(self._containers.values()))
        if first is container or first.first not in first.processes:
            return
        if first.processes[first.first].exited.done():
            raise ShimError(
                "failed-precondition", f"container_id: {first.id}, whose namespaces it shares, has ended"
            )
        shared = (*_SHARED_NAMESPACES, "pid") if sandbox_pidns else _SHARED_NAMESPACES
        pid = first.processes[first.first].pid
        for namespace in linux.get("namespaces", []):
            if namespace.get("type") in shared:
                namespace["path"] = f"/proc/{pid}/ns/{namespace['type']}"

    def _find(self, container_id: str) -> Container:
        container = self._containers.get(container_id)
        if container is None:
            raise ShimError("not-found", f"container_id: there is no container {container_id}")
        return container

    def _process(self, request: Any) -> Process:
        return self._find(request.container_id).process(request.exec_id)

    def _make_room(self, container: Container) -> None:
        """Forget processes of which only children are left that hold their output: nobody reads that now."""
        for exec_id, process in list(container.processes.items()):
            if process.is_over and exec_id != container.first:
                del container.processes[exec_id]
                process.streams.close()

    def _forget_if_done(self, container: Container, exec_id: str) -> None:
        process = container.processes.get(exec_id)
        if process is not None and process.is_done and exec_id != container.first:
            del container.processes[exec_id]
            process.streams.close()


def _hooks(path: str) -> dict[str, Any]:
    """Return the programs below `path` as the specification has hooks: `<path>/prestart/…` and so on."""
    found = {}
    for name in _HOOKS if path else ():
        with suppress(OSError):
            programs = sorted(f"{path}/{name}/{one}" for one in os.listdir(f"{path}/{name}"))
            found[name] = [{"path": one, "args": [one]} for one in programs if os.access(one, os.X_OK)]
    return {name: hooks for name, hooks in found.items() if hooks}


async def _to_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, which goes on if the caller is cancelled: the runtime must not be left half way."""
    return await asyncio.shield(asyncio.ensure_future(work))
