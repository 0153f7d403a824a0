"""A containerd with its CRI plugin, called as a kubelet calls it: by gRPC."""

from __future__ import annotations

import select
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from tests.containerd import api_pb2 as api
from tests.containerd.daemon import PATIENCE, RUNTIME, Containerd, containerd
from tests.containerd.images import write_image

TIMEOUT = 2 * PATIENCE  # seconds; the first pod of a configuration makes its template
LOOK = 0.02  # seconds between two looks
HANDLER = "kata"
PAUSE = "localhost/pause:1"
BUSYBOX = "localhost/busybox:1"
# Without any CNI plugin: a pod has its guest's network, whose NICs come by add-iface.
PLUGIN = """
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "{handler}"
"""
RUNTIME_OF = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
runtime_type = "{runtime}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}.options]
ConfigPath = "{config}"
"""


class Cri:
    """The runtime service: each method by its name, a request's fields as keywords."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._methods = {}
        service = api.DESCRIPTOR.services_by_name["RuntimeService"]
        for method in service.methods:
            answer = GetMessageClass(method.output_type)
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=answer.FromString,
            )
            self._methods[method.name] = (GetMessageClass(method.input_type), call)

    def __call__(self, method: str, **fields: Any) -> Any:
        """Call a method; raises grpc.RpcError."""
        request, call = self._methods[method]
        return call(request(**fields), timeout=TIMEOUT, wait_for_ready=True)

    def await_start(self) -> None:
        """Wait until a containerd that answers serves pods, too: it tells nobody either."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self("ListPodSandbox")
                return
            except grpc.RpcError as error:
                if "not initialized yet" not in str(error) or time.monotonic() > deadline:
                    raise
            select.select([], [], [], LOOK)


@dataclass
class Pod:
    """One pod that runs."""

    cri: Cri
    config: api.PodSandboxConfig
    id: str

    def create(
        self,
        name: str,
        *command: str,
        pid: api.NamespaceMode = api.CONTAINER,
        security: dict[str, Any] | None = None,
        resources: dict[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        """Create a container of busybox; return its id."""
        context = api.LinuxContainerSecurityContext(
            namespace_options=api.NamespaceOption(network=api.NODE, pid=pid), **security or {}
        )
        linux = api.LinuxContainerConfig(
            resources=api.LinuxContainerResources(**resources or {}), security_context=context
        )
        config = api.ContainerConfig(
            metadata=api.ContainerMetadata(name=name),
            image=api.ImageSpec(image=BUSYBOX),
            command=command,
            log_path=f"{name}.log",
            linux=linux,
            **fields,
        )
        made = self.cri("CreateContainer", pod_sandbox_id=self.id, config=config, sandbox_config=self.config)
        return str(made.container_id)

    def start(self, name: str, *command: str, **fields: Any) -> str:
        """Create a container as `create` and start it."""
        container = self.create(name, *command, **fields)
        self.cri("StartContainer", container_id=container)
        return container

    def exec(self, container: str, *command: str, timeout: int = 0) -> tuple[int, str, str]:
        """Run a command in a container; return its exit code, stdout and stderr."""
        done = self.cri("ExecSync", container_id=container, cmd=command, timeout=timeout)
        return done.exit_code, done.stdout.decode(), done.stderr.decode()

    def status(self, container: str) -> api.ContainerStatus:
        """How a container is."""
        status = self.cri("ContainerStatus", container_id=container).status
        assert isinstance(status, api.ContainerStatus)
        return status

    def await_end(self, container: str) -> api.ContainerStatus:
        """Wait until containerd knows that a container has ended: of which it tells nobody."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.status(container)).state == api.CONTAINER_RUNNING:
            assert time.monotonic() < deadline, status
            select.select([], [], [], LOOK)
        return status

    def log(self, name: str) -> list[list[str]]:
        """The log of a container: each line's time, stream, tag and text."""
        lines = Path(self.config.log_directory, f"{name}.log").read_text().splitlines()
        return [line.split(" ", 3) for line in lines]

    def await_log(self, name: str, count: int) -> list[list[str]]:
        """The same, once it has so many lines: an end may be told before the last one is written."""
        deadline = time.monotonic() + PATIENCE
        while len(lines := self.log(name)) < count:
            assert time.monotonic() < deadline, lines
            select.select([], [], [], LOOK)
        return lines


@dataclass
class Kubelet:
    """What tests the runtime as a kubelet would use it."""

    cri: Cri
    ctr: Containerd
    root: Path
    logs: Path

    def run(
        self,
        name: str,
        *,
        handler: str = HANDLER,
        pid: api.NamespaceMode = api.CONTAINER,
        privileged: bool = False,
        named: bool = True,
    ) -> Pod:
        """Start a pod; runc's can only have the host's name where they have its network."""
        self.logs.mkdir(exist_ok=True)
        directory = tempfile.mkdtemp(prefix=name, dir=self.logs)
        namespaces = api.NamespaceOption(network=api.NODE, pid=pid)
        config = api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, uid=Path(directory).name, namespace="default"),
            hostname=name if named else "",
            log_directory=directory,
            dns_config=api.DNSConfig(servers=["192.0.2.53"], searches=["example.org"]),
            linux=api.LinuxPodSandboxConfig(
                security_context=api.LinuxSandboxSecurityContext(
                    namespace_options=namespaces, privileged=privileged
                )
            ),
        )
        made = self.cri("RunPodSandbox", config=config, runtime_handler=handler)
        return Pod(self.cri, config, made.pod_sandbox_id)

    def pods(self) -> dict[str, str]:
        """Each pod's state."""
        items = self.cri("ListPodSandbox").items
        return {pod.id: api.PodSandboxState.Name(pod.state) for pod in items}

    def remove(self, pod: str) -> None:
        """Stop and remove a pod, with all that is in it."""
        self.cri("StopPodSandbox", pod_sandbox_id=pod)
        self.cri("RemovePodSandbox", pod_sandbox_id=pod)


@contextmanager
def kubelet(
    directory: Path, root: Path, handlers: dict[str, Path], rootfs: Path, more: str = ""
) -> Iterator[Kubelet]:
    """Run a containerd with its CRI plugin, the two images imported; a handler has its own configuration.

    `more` configures the plugin beyond that.
    """
    plugin = PLUGIN.format(directory=directory, pause=PAUSE, handler=HANDLER) + more
    for handler, config in handlers.items():
        plugin += RUNTIME_OF.format(handler=handler, runtime=RUNTIME, config=config)
    with containerd(directory, root, handlers[HANDLER], plugin) as daemon:
        for name, command in ((PAUSE, ["/bin/sleep", "infinity"]), (BUSYBOX, ["/bin/sh"])):
            archive = directory / "image.tar"
            write_image(archive, name, rootfs, Cmd=command, Env=["PATH=/bin"])
            imported = daemon("-n", "k8s.io", "images", "import", str(archive))
            assert imported.status == 0, imported
            archive.unlink()
        with grpc.insecure_channel(f"unix:{directory}/containerd.sock") as channel:
            yield Kubelet(Cri(channel), daemon, root, directory / "pods")
