"""containerd.task.v2.Task, and v3, of the same messages: a sandbox's containers as containerd's tasks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import orjson
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kata_shim import __version__
from kata_shim.containerd import metrics_pb2, options_pb2, status_pb2, task_pb2
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.events import pack, timestamp
from kata_shim.protos import agent_pb2
from kata_shim.sandbox.sandbox import Sandbox
from kata_shim.sandbox.stdio import Stdio, by_paths
from kata_shim.sandbox.task import Process
from kata_shim.ttrpc.server import Server

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")
_STATUS = {
    "created": status_pb2.CREATED,
    "running": status_pb2.RUNNING,
    "paused": status_pb2.PAUSED,
    "stopped": status_pb2.STOPPED,
}
_MEMORY = {
    field.name
    for field in metrics_pb2.MemoryStat.DESCRIPTOR.fields
    if field.name not in ("usage", "usage_limit", "swap_usage", "swap_limit", "max_usage")
}


def register(server: Server, service: Task) -> None:
    """Add both versions of the service to a server."""
    methods = {
        method.name: (GetMessageClass(method.input_type), GetMessageClass(method.output_type))
        for method in task_pb2.DESCRIPTOR.services_by_name["Task"].methods
    }
    for name in SERVICES:
        server.register_object(name, methods, service)


class Task:
    """The service; `shutdown` is called when containerd needs this shim no more."""

    def __init__(self, sandbox: Sandbox, shutdown: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._shutdown = shutdown
        self._starting = asyncio.Lock()
        self.tell: Callable[[str, Process], None] = lambda _event, _process: None

    async def create(self, request: task_pb2.CreateTaskRequest) -> task_pb2.CreateTaskResponse:
        """Create a container, in a sandbox that is started for the first one."""
        if request.checkpoint:
            raise ShimError("unimplemented", "checkpoint: a guest's process cannot be restored from one")
        await self._start_sandbox(_config_path(request))
        containers = await self._sandbox.containers()
        containers.tell = self.tell
        rootfs = [(mount.type, mount.source, list(mount.options)) for mount in request.rootfs]

        def stdio() -> Stdio:
            return by_paths(request.stdin, request.stdout, request.stderr, terminal=request.terminal)

        await containers.create(request.id, request.bundle, rootfs, stdio)
        return task_pb2.CreateTaskResponse(pid=self.pid)

    async def start(self, request: task_pb2.StartRequest) -> task_pb2.StartResponse:
        """Let a process begin."""
        await (await self._sandbox.containers()).start(request.id, request.exec_id)
        return task_pb2.StartResponse(pid=self.pid)

    async def state(self, request: task_pb2.StateRequest) -> task_pb2.StateResponse:
        """Tell how a process is."""
        containers = await self._sandbox.containers()
        process = containers.process(request.id, request.exec_id)
        stdin, stdout, stderr = process.stdio.paths
        answer = task_pb2.StateResponse(
            id=request.id,
            bundle=process.bundle,
            pid=self.pid,
            status=_STATUS[process.state],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=process.stdio.terminal,
            exec_id=request.exec_id,
        )
        if process.state == "stopped":
            answer.exit_status = process.exit_status
            answer.exited_at.CopyFrom(timestamp(process.exited_at))
        return answer

    async def delete(self, request: task_pb2.DeleteRequest) -> task_pb2.DeleteResponse:
        """Forget a process that has ended, or a whole container."""
        containers = await self._sandbox.containers()
        process = await containers.delete(request.id, request.exec_id, ends=True)  # Shutdown is next
        return task_pb2.DeleteResponse(
            pid=self.pid, exit_status=process.exit_status, exited_at=timestamp(process.exited_at)
        )

    async def pids(self, request: task_pb2.PidsRequest) -> task_pb2.PidsResponse:
        """Answer the sandbox's pid: those in the guest mean nothing on the host."""
        (await self._sandbox.containers()).find(request.id)
        return task_pb2.PidsResponse(processes=[status_pb2.ProcessInfo(pid=self.pid)])

    async def pause(self, request: task_pb2.PauseRequest) -> Empty:
        """Freeze a container."""
        await (await self._sandbox.containers()).pause(request.id)
        return Empty()

    async def resume(self, request: task_pb2.ResumeRequest) -> Empty:
        """Let a container go on."""
        await (await self._sandbox.containers()).resume(request.id)
        return Empty()

    async def checkpoint(self, _: task_pb2.CheckpointTaskRequest) -> Empty:
        """Refuse: the processes are the guest's."""
        raise ShimError("unimplemented", "checkpoint: the processes of a guest cannot be checkpointed")

    async def kill(self, request: task_pb2.KillRequest) -> Empty:
        """Send a signal."""
        containers = await self._sandbox.containers()
        await containers.kill(request.id, request.exec_id, request.signal, everything=request.all)
        return Empty()

    async def exec(self, request: task_pb2.ExecProcessRequest) -> Empty:
        """Note one more process, to be started by Start."""
        containers = await self._sandbox.containers()
        containers.find(request.id)
        stdio = by_paths(request.stdin, request.stdout, request.stderr, terminal=request.terminal)
        try:
            await containers.add_exec(request.id, request.exec_id, _json(request.spec.value, "spec"), stdio)
        except ShimError:
            await stdio.close()
            raise
        return Empty()

    async def resize_pty(self, request: task_pb2.ResizePtyRequest) -> Empty:
        """Set the size of a process's terminal."""
        containers = await self._sandbox.containers()
        await containers.resize(request.id, request.exec_id, request.height, request.width)
        return Empty()

    async def close_io(self, request: task_pb2.CloseIORequest) -> Empty:
        """Let a process's stdin end."""
        if request.stdin:
            (await self._sandbox.containers()).close_stdin(request.id, request.exec_id)
        return Empty()

    async def update(self, request: task_pb2.UpdateTaskRequest) -> Empty:
        """Change a container's limits."""
        containers = await self._sandbox.containers()
        await containers.update(request.id, _json(request.resources.value, "resources"))
        return Empty()

    async def wait(self, request: task_pb2.WaitRequest) -> task_pb2.WaitResponse:
        """Answer when a process has ended."""
        process = (await self._sandbox.containers()).process(request.id, request.exec_id)
        await process.exited.wait()
        return task_pb2.WaitResponse(exit_status=process.exit_status, exited_at=timestamp(process.exited_at))

    async def stats(self, request: task_pb2.StatsRequest) -> task_pb2.StatsResponse:
        """Tell what a container uses of the guest."""
        stats = await (await self._sandbox.containers()).stats(request.id)
        return task_pb2.StatsResponse(stats=pack(_metrics(stats)))

    async def connect(self, request: task_pb2.ConnectRequest) -> task_pb2.ConnectResponse:
        """Tell who we are."""
        return task_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=self.pid, version=__version__)

    async def shutdown(self, request: task_pb2.ShutdownRequest) -> Empty:
        """End, unless there are containers."""
        if request.now or not self._sandbox.has_containers:
            self._shutdown()
        return Empty()

    @property
    def pid(self) -> int:
        """The pid of the sandbox: QEMU's."""
        return self._sandbox.record.pid

    async def _start_sandbox(self, config: str) -> None:
        async with self._starting:
            if not self._sandbox.is_asked:
                await self._sandbox.start(config, _silent)


async def _silent(_step: str) -> None:
    return None


def _config_path(request: task_pb2.CreateTaskRequest) -> str:
    """Return the configuration.toml that the runtime's options name; "" for the usual places."""
    if not request.HasField("options"):
        return ""
    if not request.options.type_url.endswith("runtimeoptions.v1.Options"):
        return ""
    try:
        return options_pb2.Options.FromString(request.options.value).config_path
    except DecodeError:
        raise invalid(f"options: not a {request.options.type_url}") from None


def _json(data: bytes, field: str) -> Any:
    try:
        return orjson.loads(data)
    except ValueError as error:
        raise invalid(f"{field}: {error}") from None


def _metrics(stats: agent_pb2.CgroupStats) -> Message:
    cpu, memory, pids = stats.cpu_stats, stats.memory_stats, stats.pids_stats
    return metrics_pb2.Metrics(
        pids=metrics_pb2.PidsStat(current=pids.current, limit=pids.limit),
        cpu=metrics_pb2.CPUStat(
            usage_usec=cpu.cpu_usage.total_usage // 1000,
            user_usec=cpu.cpu_usage.usage_in_usermode // 1000,
            system_usec=cpu.cpu_usage.usage_in_kernelmode // 1000,
            nr_periods=cpu.throttling_data.periods,
            nr_throttled=cpu.throttling_data.throttled_periods,
            throttled_usec=cpu.throttling_data.throttled_time // 1000,
        ),
        memory=metrics_pb2.MemoryStat(
            usage=memory.usage.usage,
            usage_limit=memory.usage.limit,
            max_usage=memory.usage.max_usage,
            swap_usage=memory.swap_usage.usage,
            **{name: value for name, value in memory.stats.items() if name in _MEMORY},
        ),
    )
