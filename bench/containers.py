"""What containers cost under one containerd: ours, each in a guest of its own, against runc's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.cases import Comparison
from bench.memory import pss
from bench.place import INTERPRETER, PATIENCE, Ground, Place
from bench.runc import shims

OURS, RUNC = "io.containerd.kata.v2", "io.containerd.runc.v2"
AT_ONCE = 20
STREAMED = 64 << 20  # bytes
CONFIGURATION = """version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{0}/containerd.sock"
[ttrpc]
address = "{0}/containerd.sock.ttrpc"
"""
_STARTED, _ENDED, _EXECUTED = "bench", "bench-ended", "bench-exec"


class Node(Place):
    """A place with a factory and a containerd whose shims of ours are the place's."""

    def __init__(self, ground: Ground, name: str, *, cache: int = 0) -> None:
        super().__init__(ground, name, cache=cache)
        self.directory = self.root / "containerd"
        # The ground is mounted noexec, which runc's containers would be, too.
        self.rootfs = Path(self._ending.enter_context(tempfile.TemporaryDirectory()))
        programs = Path(INTERPRETER).parent
        self.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        _make_rootfs(self.rootfs)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Run the factory and containerd, until the body ends."""
        self.factory = self.start_factory()
        self.directory.mkdir()
        (self.directory / "config.toml").write_text(CONFIGURATION.format(self.directory))
        command = ["containerd", "--config", str(self.directory / "config.toml")]
        with (self.directory / "log").open("wb") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, cwd="/")
        try:
            self.ctr("--connect-timeout", "30s", "version")
            yield
        finally:
            daemon.terminate()
            daemon.wait(PATIENCE)

    def command(self, *words: str) -> list[str]:
        """The command line of a `ctr`."""
        return ["/usr/bin/ctr", "--address", f"{self.directory}/containerd.sock", *words]

    def ctr(self, *words: str) -> None:
        """Run `ctr` to its end; raises RuntimeError."""
        self.time(self.command(*words))

    def run(self, runtime: str, name: str, *words: str, flag: str = "--rm") -> list[str]:
        """The command line of a `ctr run`."""
        return self.command("run", flag, "--runtime", runtime, "--rootfs", str(self.rootfs), name, *words)

    def start(self, runtime: str, name: str) -> None:
        """Start a container that does nothing."""
        self.ctr(*self.run(runtime, name, "/bin/sleep", "1000000", flag="--detach")[3:])

    def shims(self, runtime: str) -> list[int]:
        """The pids of what serves the containers there are."""
        if runtime == OURS:
            return [sandbox["shimPid"] for sandbox in json.loads(self.cli("list", "--json"))]
        return [int(process.name) for process in shims(Path("/usr/bin/containerd-shim-runc-v2"))]

    def remove(self, name: str) -> None:
        """End and remove a container."""
        self.ctr("tasks", "delete", "--force", name)
        self.ctr("containers", "delete", name)


def lives(ground: Ground, rounds: int) -> list[Comparison]:
    """(p) `ctr run --rm` of true, `ctr run -d` and `ctr tasks exec`, from ctr's start to its end."""
    found = []
    for cache, way in ((0, "template, zygote"), (1, "cache, zygote")):
        with Node(ground, f"node{cache}", cache=cache) as node, node.serving():
            found += _lives(node, way, rounds)
    return found


def _lives(node: Node, way: str, rounds: int) -> list[Comparison]:
    whole = Comparison(f"(p) `ctr run --rm` of `true`: {way}", "runc", "≤ 8" if way.startswith("t") else "")
    detached = Comparison(f"(p) `ctr run -d`: {way}", "runc", "")
    executed = Comparison(f"(p) `ctr tasks exec` of `true`: {way}", "runc", "")
    for _ in range(rounds):
        for runtime, times in ((OURS, "measured"), (RUNC, "basis")):
            node.factory.until_full()
            getattr(whole, times).append(node.time(node.run(runtime, _ENDED, "/bin/true")))
            node.factory.until_full()
            command = node.run(runtime, _STARTED, "/bin/sleep", "1000000", flag="--detach")
            getattr(detached, times).append(node.time(command))
            command = node.command("tasks", "exec", "--exec-id", _EXECUTED, _STARTED, "/bin/true")
            getattr(executed, times).append(node.time(command))
            node.remove(_STARTED)
    return [whole, detached, executed]


def streams(ground: Ground, rounds: int) -> list[Comparison]:
    """(q) How fast what a container writes, or reads, goes through `ctr`."""
    out = Comparison("(q) stdout of a container through `ctr`, MB", "runc", "≥ 30/s", unit="/s")
    back = Comparison("(q) stdin of a container through `ctr`, MB", "runc", "≥ 30/s", unit="/s")
    with Node(ground, "node") as node, node.serving():
        for _ in range(rounds):
            for runtime, times in ((OURS, "measured"), (RUNC, "basis")):
                node.start(runtime, _STARTED)
                getattr(out, times).append(_rate(node, _read))
                getattr(back, times).append(_rate(node, _write))
                node.remove(_STARTED)
    return [out, back]


def _rate(node: Node, move: Callable[[subprocess.Popen[bytes]], float]) -> float:
    """Return MB per second between the first byte of an exec's and the last."""
    # dd, which moves blocks: busybox's head moves bytes, and what it costs an emulated guest is all of it.
    blocks = f"bs=64k count={STREAMED >> 16}"
    sending = f"echo; dd if=/dev/zero {blocks} 2>/dev/null"
    taking = f"echo; dd of=/dev/null iflag=fullblock {blocks} 2>/dev/null; echo"
    script = sending if move is _read else taking
    command = node.command("tasks", "exec", "--exec-id", _EXECUTED, _STARTED, "/bin/sh", "-c", script)
    with subprocess.Popen(
        command,
        bufsize=0,  # a buffer would take more than the first byte
        env=node.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
    ) as process:
        seconds = move(process)
    if process.returncode:
        raise RuntimeError(f"{command} ended with status {process.returncode}")
    return STREAMED / 1e6 / seconds


def _read(process: subprocess.Popen[bytes]) -> float:
    assert process.stdout is not None
    process.stdout.read(1)
    began, left = time.perf_counter(), STREAMED
    while left:
        left -= len(os.read(process.stdout.fileno(), 1 << 20))
    return time.perf_counter() - began


def _write(process: subprocess.Popen[bytes]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    began = time.perf_counter()
    left = memoryview(bytes(STREAMED))
    while left:
        left = left[process.stdin.write(left) or 0 :]
    process.stdout.readline()
    return time.perf_counter() - began


def together(ground: Ground, rounds: int) -> list[Comparison]:
    """(r) Twenty containers, each in a guest of its own, started at once; what their shims hold then."""
    name = f"(r) {AT_ONCE} × `ctr run -d` at once, until the last is up"
    compared = Comparison(name, "runc", "all come up")
    memory = Comparison(f"(r) PSS of a shim with a container, {AT_ONCE} of them", "runc", "", unit="MiB")
    names = [f"bench{number}" for number in range(AT_ONCE)]
    with Node(ground, "node") as node, node.serving():
        for _ in range(max(1, rounds // 5)):
            for runtime, times in ((OURS, "measured"), (RUNC, "basis")):
                began = time.perf_counter()
                commands = [node.run(runtime, one, "/bin/sleep", "1000000", flag="--detach") for one in names]
                for pid in [node.spawn(command) for command in commands]:
                    node.wait(pid)
                getattr(compared, times).append(time.perf_counter() - began)
                getattr(memory, times).extend(float(pss(pid)) for pid in node.shims(runtime))
                for one in names:
                    node.remove(one)
    return [compared, memory]


def _make_rootfs(path: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (path / name).mkdir(parents=True)
    busybox = "/bin/busybox"
    (path / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    (path / "bin/busybox").chmod(0o755)
    for name in ("sh", "true", "sleep", "dd"):
        os.symlink("busybox", path / "bin" / name)
