"""Pods, as a kubelet has containerd's CRI plugin make them: one VM, several containers."""

from __future__ import annotations

from tests.containerd import api_pb2 as api
from tests.containerd.cri import HANDLER, Kubelet


def test_a_pod(node: Kubelet) -> None:
    pod = node.run("a")
    assert node.pods() == {pod.id: "SANDBOX_READY"}
    status = node.cri("PodSandboxStatus", pod_sandbox_id=pod.id).status
    assert (status.state, status.runtime_handler) == (api.SANDBOX_READY, HANDLER)
    container = pod.start("c", "/bin/sh", "-c", "echo out; echo err >&2; exec sleep infinity")
    assert pod.status(container).state == api.CONTAINER_RUNNING
    assert pod.exec(container, "/bin/sh", "-c", "echo hello; echo oh >&2; exit 3") == (3, "hello\n", "oh\n")
    node.remove(pod.id)
    assert node.pods() == {}
