"""What pods cost through containerd's CRI plugin, ours against runc's, called as a kubelet calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from bench.cases import Comparison
from bench.containers import Node
from bench.place import Ground
from tests.containerd.cri import HANDLER, Kubelet, kubelet

RUNC = "runc"
PLUGIN = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
_CALLS = ("RunPodSandbox", "CreateContainer and StartContainer", "ExecSync of `true`", "StopPodSandbox")
_T = TypeVar("_T")


def pods(ground: Ground, rounds: int) -> list[Comparison]:
    """(s) A pod with one container, each call from its start to its answer."""
    found = {call: Comparison(f"(s) {call}: template, zygote", "runc", "") for call in _CALLS}
    with Node(ground, "node") as node:
        node.start_factory()
        handlers = {HANDLER: node.configuration}
        with kubelet(node.root / "cri", node.root, handlers, node.rootfs, PLUGIN) as calls:
            for _ in range(rounds):
                for handler in (HANDLER, RUNC):
                    for call, seconds in _one(calls, handler).items():
                        compared = found[call]
                        (compared.basis if handler == RUNC else compared.measured).append(seconds)
    return list(found.values())


def _one(calls: Kubelet, handler: str) -> dict[str, float]:
    run, started, executed, stop = _CALLS
    times = {}
    times[run], pod = _timed(lambda: calls.run("bench", handler=handler, named=handler == HANDLER))
    times[started], container = _timed(lambda: pod.start("c", "/bin/sleep", "1000000"))
    times[executed], (status, *_) = _timed(lambda: pod.exec(container, "/bin/true"))
    if status:
        raise RuntimeError(f"true ended with status {status} under {handler}")
    times[stop], _ = _timed(lambda: calls.cri("StopPodSandbox", pod_sandbox_id=pod.id))
    calls.cri("RemovePodSandbox", pod_sandbox_id=pod.id)
    return times


def _timed(act: Callable[[], _T]) -> tuple[float, _T]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result
