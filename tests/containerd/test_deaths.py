"""Who dies while containers run: containerd, shim, QEMU, guest. The truth is told, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from kata_shim import mounts
from kata_shim.containerd import task_pb2
from kata_shim.removal import remove_tree
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import call
from tests.containerd.daemon import RUNTIME, Containerd, containerd, listening, topics
from tests.rootfs import make_rootfs
from tests.started import PATIENCE, kill, opened, shims, taken, watched
from tests.support import BIN, Call, Runtime, shipped

TRUTH = 15.0  # seconds until containerd knows; on a quiet machine 0.5 to 2.4
MOMENTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)  # seconds after the shim's start; 0.6 is what a container takes
CRASH = """
for line in open("/proc/1/maps"):
    place, rights, *_ = line.split()
    if "x" in rights and "/" in line:
        first, last = (int(number, 16) for number in place.split("-"))
        with open("/proc/1/mem", "wb", 0) as memory:
            memory.seek(first)
            memory.write(b"\\xcc" * (last - first))
"""
ECHO = 'while read word; do echo "got $word"; [ "$word" = end ] && exit 3; done'


@dataclass
class Task:
    """A container that answers each line of its stdin, by FIFOs that nobody else has."""

    daemon: Containerd
    root: Path
    id: str
    stdin: int
    stdout: int
    socket: Path

    @property
    def shim(self) -> int:
        """The pid of its shim."""
        (pid,) = shims(self.root, self.id)
        return pid

    @property
    def qemu(self) -> int:
        """The pid of its QEMU."""
        return self.daemon.tasks()[self.id][0]

    def answers(self, word: str) -> bool:
        """Whether it answers."""
        os.write(self.stdin, f"{word}\n".encode())
        heard = b""
        while not heard.endswith(b"\n"):
            ready, _, _ = select.select([self.stdout], [], [], PATIENCE)
            assert ready, f"no answer to {word}"
            heard += os.read(self.stdout, 4096)
        return heard == f"got {word}\n".encode()

    @property
    def is_cleared(self) -> bool:
        """Whether nothing is left but what is containerd's own."""
        left = [path for path in (self.root / "sandboxes" / self.id, self.socket) if os.path.lexists(path)]
        return not left and not mounts.below(str(self.root / "sandboxes"))

    def let_go(self) -> None:
        """Close the FIFOs."""
        os.close(self.stdin)
        os.close(self.stdout)


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[Path]:
    """A root file system in which nothing may be missing afterwards."""
    rootfs = make_rootfs(tmp_path / "rootfs")
    (rootfs / "root/deep/deeper").mkdir(parents=True)
    (rootfs / "root/empty").touch()
    (rootfs / "run").mkdir()  # which the runtime mounts on
    (rootfs / "etc/marker").write_text("the host's")
    before = contents(rootfs)
    yield rootfs
    assert contents(rootfs) == before


@pytest.fixture
def mortal(root: Path) -> Iterator[Containerd]:
    """A containerd that may be killed, and of which no socket, sandbox or name may be left."""
    directory = root / "mortal"
    try:
        with containerd(directory, root, shipped(root, accelerator="tcg")) as daemon:
            yield daemon
            if daemon.process is None:
                daemon.start()
            for name in daemon("containers", "list", "-q").stdout.split():
                daemon.remove(name)
            assert daemon.tasks() == {}
    finally:
        shutil.copy(directory / "log", root / "mortal.log")
        remove_tree(str(directory))
    for path in sockets(directory):
        assert not path.exists()
    assert not list((root / "sandboxes").glob("*"))
    assert not list((root / "containers").glob("*"))


@pytest.fixture
def task(mortal: Containerd, root: Path, marked: Path) -> Iterator[Task]:
    """A running one."""
    run = [*("run", "--detach", "--runtime", RUNTIME, "--rootfs", str(marked)), "c", "/bin/sh", "-c", ECHO]
    with Call(mortal.command(*run), stdin=subprocess.PIPE, cwd="/") as running:
        assert running.wait(PATIENCE) == 0
    (shim,) = shims(root, "c")
    fifos = {name.rpartition("-")[2]: name for name in opened(shim) if name.endswith(("-stdin", "-stdout"))}
    (socket,) = (path for path in sockets(mortal.directory) if path.is_socket())
    stdout = os.open(fifos["stdout"], os.O_RDONLY)
    task = Task(mortal, root, "c", os.open(fifos["stdin"], os.O_WRONLY), stdout, socket)
    assert task.answers("first")
    yield task
    task.let_go()


def test_containerd_is_killed_and_started_again(task: Task) -> None:
    shim, qemu = task.shim, task.qemu
    task.daemon.stop(signal.SIGKILL)
    assert task.answers("meanwhile")
    task.daemon.start()
    assert task.daemon.tasks() == {"c": (qemu, "RUNNING")}
    assert task.shim == shim
    assert task.answers("afterwards")
    done = task.daemon("tasks", "exec", "--exec-id", "e", "c", "/bin/sh", "-c", "echo inside; exit 4")
    assert (done.status, done.stdout) == (4, "inside\n")
    with listening(task.daemon) as until:
        assert task.answers("end")
        assert '"exit_status":3' in until("/tasks/exit")[-1].replace(" ", "")
    assert "exit code 3" in task.daemon("tasks", "delete", "c").stderr


def test_a_process_ends_while_there_is_no_containerd(task: Task) -> None:
    qemu = task.qemu
    task.daemon.stop(signal.SIGKILL)
    assert task.answers("end")

    async def ended() -> int:
        async with await Client.connect(task.socket) as client:
            return int((await call(client, "Wait", id="c")).exit_status)

    assert asyncio.run(ended()) == 3
    task.daemon.start()
    assert task.daemon.tasks() == {"c": (qemu, "STOPPED")}
    with listening(task.daemon) as until:
        assert "exit code 3" in task.daemon("tasks", "delete", "c").stderr
        until("/tasks/delete")


def test_shim_is_killed(task: Task) -> None:
    qemu = task.qemu
    with listening(task.daemon) as until, watched(qemu) as has_ended:
        started = time.monotonic()
        kill(task.shim)
        assert '"exit_status":137' in until("/tasks/exit")[-1].replace(" ", "")
        assert taken(started) < TRUTH
        assert has_ended(TRUTH)
        until("/tasks/delete")
        assert taken(started) < TRUTH
    assert task.is_cleared


def test_qemu_is_killed(task: Task) -> None:
    with listening(task.daemon) as until:
        started = time.monotonic()
        kill(task.qemu)
        assert '"exit_status":137' in until("/tasks/exit")[-1].replace(" ", "")
        assert taken(started) < TRUTH
        assert task.daemon.tasks()["c"][1] == "STOPPED"
        assert "exit code 137" in task.daemon("tasks", "delete", "c").stderr
        assert topics(until("/tasks/delete")) == ["/tasks/exit", "/tasks/delete"]


def test_agent_is_killed(task: Task, runtime: Runtime) -> None:
    """The kernel does not let init be killed, so it is made to crash."""
    assert runtime("exec", "--guest", "c", "--", "kill", "-KILL", "1").status == 0
    assert task.answers("still there")
    with listening(task.daemon) as until:
        started = time.monotonic()
        crashed = runtime("exec", "--guest", "c", "--", "python3", "-c", CRASH)
        assert crashed.status != 0
        assert '"exit_status":137' in until("/tasks/exit")[-1].replace(" ", "")
        assert taken(started) < TRUTH
        assert task.daemon.tasks()["c"][1] == "STOPPED"
    assert "panic" in runtime("state", "c").json["cause"]
    assert "exit code 137" in task.daemon("tasks", "delete", "c").stderr


def test_containerd_and_shim_are_killed(task: Task) -> None:
    task.daemon.stop(signal.SIGKILL)
    kill(task.shim)
    task.daemon.start()
    assert task.daemon.tasks() == {}
    assert task.is_cleared


def test_a_sandbox_is_not_taken_over_without_its_containers(task: Task, runtime: Runtime) -> None:
    """A shim that is started by somebody else's call cannot have the containers' streams and exit codes."""
    qemu = task.qemu
    task.daemon.stop(signal.SIGKILL)
    kill(task.shim)
    with watched(qemu) as has_ended:
        called = runtime("kata-network", "list-ifaces", "c")
        assert called.status == 1
        assert "its shim was ended, and its containers with it" in called.stderr
        assert has_ended()
    assert runtime("state", "c").json["status"] == "stopped"
    task.daemon.start()
    assert task.daemon.tasks() == {}
    assert task.is_cleared


def test_delete_ends_a_shim_that_stands_still(task: Task) -> None:
    shim = task.shim
    bundle = task.daemon.directory / "state/io.containerd.runtime.v2.task/default/c"
    flags = ["-namespace", "default", "-address", f"{task.daemon.directory}/containerd.sock", "-id", "c"]
    with watched(shim) as has_ended:
        os.kill(shim, signal.SIGSTOP)
        started = time.monotonic()
        deleted = subprocess.run(
            [BIN / "containerd-shim-kata-v2", *flags, "-bundle", bundle, "delete"],
            cwd=bundle,
            env=task.daemon.environment,
            capture_output=True,
            timeout=PATIENCE,
        )
        assert taken(started) < TRUTH
        assert has_ended()
    assert (deleted.returncode, deleted.stderr) == (0, b"")
    assert task_pb2.DeleteResponse.FromString(deleted.stdout).exit_status == 137
    assert task.is_cleared


@pytest.mark.parametrize("victim", ["shim", "QEMU"])
def test_a_pod_ends_as_a_whole(mortal: Containerd, root: Path, marked: Path, victim: str) -> None:
    for name in ("pod", "first", "second"):
        kind = "sandbox" if name == "pod" else "container"
        flags = ["--detach", "--annotation", "io.kubernetes.cri.sandbox-id=pod"]
        flags += ["--annotation", f"io.kubernetes.cri.container-type={kind}"]
        assert mortal.run(marked, name, "/bin/sleep", "1000", flags=tuple(flags)).status == 0
    tasks = mortal.tasks()
    (qemu,) = {pid for pid, _ in tasks.values()}
    assert sorted(os.listdir(root / "containers")) == ["first", "second"]
    with watched(qemu) as has_ended:
        kill(qemu if victim == "QEMU" else shims(root, "pod")[0])
        assert has_ended(TRUTH)
    with listening(mortal) as until:
        mortal.remove("first")
        mortal.remove("second")
        mortal.remove("pod")
        until("/containers/delete")
    assert mortal.tasks() == {}
    assert not list(root.glob("sandboxes/*"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_shim_is_killed_while_a_container_is_created(
    mortal: Containerd, root: Path, marked: Path, moment: float
) -> None:
    run = ["run", "--rm", "--runtime", RUNTIME, "--rootfs", str(marked), "c", "/bin/sleep", "1000"]
    with (
        Call(
            mortal.command(*run),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
        ) as running,
        watched(running.pid) as has_ended,
    ):
        while not (found := shims(root, "c")) and not has_ended(0.001):
            pass
        assert not has_ended(moment)
        kill(found[0])
        _, said = running.communicate(timeout=PATIENCE)
        assert running.returncode in (1, 137), said  # as there was no container yet, or one
    # Of a shim that dies before it is connected to containerd says nothing to anybody; the next start knows.
    # Of one that dies when there is a task, ctr may say so before containerd has cleared it.
    started = time.monotonic()
    while "already exists" in (again := mortal.run(marked, "c", "/bin/true")).stderr:
        assert taken(started) < PATIENCE, again
        mortal.remove("c")  # which ctr could not while there was a task
    assert again.status == 0, again
    assert mortal.tasks() == {}


def sockets(directory: Path) -> list[Path]:
    """Where the shims of a containerd listen, or would, by the names that a test gives."""
    names = (f"{directory}/containerd.sock/default/{name}" for name in ("c", "pod"))
    return [Path("/run/containerd/s", sha256(name.encode()).hexdigest()) for name in names]


def contents(directory: Path) -> list[tuple[str, int, int]]:
    """All that is in a directory."""
    return sorted((str(path), path.lstat().st_mode, path.lstat().st_size) for path in directory.rglob("*"))
