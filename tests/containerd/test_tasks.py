"""Containers by `ctr`: what they print, how they end, and what they leave: nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.containerd.daemon import PATIENCE, RUNTIME, Containerd, listening, topics
from tests.support import Call, Result


def test_output_and_status(ctr: Containerd, rootfs: Path) -> None:
    done = ctr.run(rootfs, "c", "/bin/sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.status, done.stdout) == (3, "out\n"), done
    assert done.stderr.startswith("err\n")


def test_it_is_another_kernel(ctr: Containerd, rootfs: Path) -> None:
    done = ctr.run(rootfs, "c", "/bin/cat", "/proc/version")
    assert "debian-kernel@lists.debian.org" in done.stdout
    assert done.stdout != Path("/proc/version").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("nowhere",), "executable file `nowhere` not found in $PATH"),
        (("/etc/passwd",), "Permission denied"),
    ],
)
def test_command_that_cannot_be_run(
    ctr: Containerd, rootfs: Path, command: tuple[str, ...], message: str
) -> None:
    done = ctr.run(rootfs, "c", *command)
    assert done.status == 1
    assert message in done.stderr
    assert ctr.tasks() == {}


def test_life_of_a_task(ctr: Containerd, rootfs: Path) -> None:
    script = 'trap "exit 7" TERM; touch /tmp/ready; while true; do sleep 0.1; done'
    assert ctr.run(rootfs, "c", "/bin/sh", "-c", script, flags=("--detach",)).status == 0
    pid, status = ctr.tasks()["c"]
    assert status == "RUNNING"
    assert "qemu" in Path(f"/proc/{pid}/cmdline").read_text()
    assert ctr("tasks", "pause", "c").status == 0
    assert ctr.tasks()["c"] == (pid, "PAUSED")
    assert ctr("tasks", "resume", "c").status == 0
    assert ctr.tasks()["c"] == (pid, "RUNNING")
    refused = ctr("tasks", "delete", "c")
    assert refused.status == 1
    ready = "while ! [ -e /tmp/ready ]; do sleep 0.1; done"
    assert ctr("tasks", "exec", "--exec-id", "e", "c", "/bin/sh", "-c", ready).status == 0
    with listening(ctr) as until:
        assert ctr("tasks", "kill", "c").status == 0
        assert '"exit_status":7' in until("/tasks/exit")[-1].replace(" ", "")
        assert ctr.tasks()["c"] == (pid, "STOPPED")
        assert "exit code 7" in ctr("tasks", "delete", "c").stderr
        until("/tasks/delete")
    assert not Path(f"/proc/{pid}").exists()


def test_events(ctr: Containerd, rootfs: Path) -> None:
    with listening(ctr) as until:
        assert ctr.run(rootfs, "c", "/bin/true").status == 0
        heard = topics(until("/tasks/delete"))
    assert heard == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


def test_exec(ctr: Containerd, rootfs: Path) -> None:
    assert ctr.run(rootfs, "c", "/bin/sleep", "1000", flags=("--detach",)).status == 0
    done = ctr("tasks", "exec", "--exec-id", "e", "c", "/bin/sh", "-c", "ps; echo $$; exit 4")
    assert done.status == 4
    assert "/bin/sleep 1000" in done.stdout
    missing = ctr("tasks", "exec", "--exec-id", "f", "c", "nowhere")
    assert missing.status == 1
    assert "nowhere" in missing.stderr
    user = ctr("tasks", "exec", "--exec-id", "g", "--user", "7:8", "c", "/bin/id")
    assert user == Result(0, "uid=7 gid=8 groups=8\n", "")


@pytest.mark.parametrize("_", range(3))
def test_streams_lose_nothing(ctr: Containerd, rootfs: Path, tmp_path: Path, _: int) -> None:
    """Though ctr reads no more of them once it has heard of the process's end."""
    data = os.urandom(10 << 20)
    with Call(
        ctr.command("run", "--rm", "--runtime", RUNTIME, "--rootfs", str(rootfs), "c", "/bin/cat"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        # ctr forgets the end of a stdin that ends before it has started the task.
        running.stdin.write(data[:1])
        running.stdin.flush()
        assert running.stdout.read(1) == data[:1]
        with Call(["cat"], stdin=subprocess.PIPE, stdout=running.stdin) as feeding:
            running.stdin.close()
            assert feeding.stdin is not None
            with (
                (tmp_path / "output").open("wb") as output,
                Call(["cat"], stdin=running.stdout, stdout=output) as reading,
            ):
                feeding.stdin.write(data[1:])
                feeding.stdin.close()
                assert reading.wait(PATIENCE) == 0
            assert feeding.wait(PATIENCE) == 0
        assert running.wait(PATIENCE) == 0
    found = (tmp_path / "output").read_bytes()
    assert len(found) == len(data) - 1
    assert hashlib.sha256(found).digest() == hashlib.sha256(data[1:]).digest()


def test_metrics(ctr: Containerd, rootfs: Path) -> None:
    assert ctr.run(rootfs, "c", "/bin/sleep", "1000", flags=("--detach",)).status == 0
    lines = ctr("tasks", "metrics", "c").stdout.splitlines()
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    assert found["pids.current"] == "1"
    assert 0 < int(found["memory.usage"]) < 1 << 30
    assert int(found["cpu.usage_usec"]) > 0
