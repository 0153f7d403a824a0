"""How containers and their processes end: by signals, for want of memory, with others still running."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kata_shim.contract import oci
from tests.containerd.daemon import PATIENCE, RUNTIME, Containerd, listening
from tests.support import Call, Result, Runtime

MIB = 1 << 20
Run = Callable[..., Result]


@pytest.fixture
def run(ctr: Containerd, rootfs: Path, tmp_path: Path) -> Run:
    """Run the container `c` by a config.json with some resources and hooks."""

    def run(*args: str, flags: tuple[str, ...] = ("--rm",), hooks: Any = None, **resources: Any) -> Result:
        spec = oci.default_spec(str(rootfs), list(args), [], "/", terminal=False)
        spec["linux"]["resources"] = resources
        spec["linux"]["namespaces"] = [{"type": name} for name in ("pid", "ipc", "uts", "mount", "network")]
        spec["hooks"] = hooks or {}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(spec))
        return ctr("run", *flags, "--runtime", RUNTIME, "--config", str(path), "c")

    return run


def started(run: Run, *args: str, **resources: Any) -> None:
    """Start the container and leave it running."""
    done = run(*(args or ("/bin/sleep", "1000")), flags=("--detach",), **resources)
    assert done.status == 0, done


def inside(ctr: Containerd, script: str, name: str = "e") -> Result:
    """Run a script in the container."""
    return ctr("tasks", "exec", "--exec-id", name, "c", "/bin/sh", "-c", script)


def test_out_of_memory(ctr: Containerd, run: Run) -> None:
    with listening(ctr) as until:
        done = run("/bin/tail", "/dev/zero", memory={"limit": 32 * MIB})
        assert done.status == 137
        (told,) = [line for line in until("/tasks/oom") if "/tasks/oom" in line]
        assert '"container_id":"c"' in told.replace(" ", "")
        until("/tasks/delete")


def test_only_who_took_too_much_ends(ctr: Containerd, run: Run) -> None:
    started(run, memory={"limit": 32 * MIB})
    assert inside(ctr, "tail /dev/zero").status == 137
    assert inside(ctr, "echo lives") == Result(0, "lives\n", "")


def test_limits_hold(ctr: Containerd, run: Run) -> None:
    limits = {
        "memory": {"limit": 64 * MIB, "swap": 64 * MIB},
        "cpu": {"quota": 20000, "period": 100000, "shares": 512},
        "pids": {"limit": 5},
    }
    started(run, **limits)
    shown = inside(ctr, "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max").stdout
    assert shown == f"{64 * MIB}\n0\n20000 100000\n5\n"
    crowded = inside(ctr, "for n in 1 2 3 4 5 6; do sleep 1000 & done; echo forked")
    assert "can't fork" in crowded.stderr
    # The rest of them are the container's.
    metrics = dict(
        line.split() for line in ctr("tasks", "metrics", "c").stdout.splitlines() if "pids" in line
    )
    assert 2 <= int(metrics["pids.current"]) <= 5
    assert metrics["pids.limit"] == "5"


@contextmanager
def executing(ctr: Containerd) -> Iterator[Call]:
    """Run one more process in the container, which sleeps once this begins."""
    words = ("tasks", "exec", "--exec-id", "long", "c", "/bin/sh", "-c", "echo up; sleep 1000")
    with Call(ctr.command(*words), stdout=subprocess.PIPE, cwd="/") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        yield running


def test_signal_to_all(ctr: Containerd, run: Run) -> None:
    started(run)
    with executing(ctr) as running:
        with listening(ctr) as until:
            assert ctr("tasks", "kill", "--all", "--signal", "SIGKILL", "c").status == 0
            until('"id":"c"')
        assert running.wait(PATIENCE) == 137
    assert ctr.tasks()["c"][1] == "STOPPED"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exec sleep 1000", 137),  # PID 1 gets no signal that it has no handler for
        ("trap '' TERM; while true; do sleep 1; done", 137),
        ("trap 'exit 9' TERM; while true; do sleep 0.1; done", 9),
    ],
)
def test_sigterm_to_the_first_process(ctr: Containerd, run: Run, script: str, status: int) -> None:
    started(run, "/bin/sh", "-c", f"touch /tmp/begun; {script}")
    assert inside(ctr, "while ! [ -e /tmp/begun ]; do sleep 0.1; done; rm /tmp/begun").status == 0
    with listening(ctr) as until:
        assert ctr("tasks", "kill", "c").status == 0
        assert f'"exit_status":{status}' in until("/tasks/exit")[-1].replace(" ", "")


def test_all_end_with_the_first_process(ctr: Containerd, run: Run) -> None:
    started(run)
    with executing(ctr) as running:
        assert ctr("tasks", "kill", "--signal", "SIGKILL", "c").status == 0
        assert running.wait(PATIENCE) == 137


def test_a_daemon_outlives_who_has_started_it(ctr: Containerd, runtime: Runtime, run: Run) -> None:
    started(run, "/bin/sh", "-c", "while true; do wait; sleep 0.1; done")
    assert inside(ctr, "setsid sleep 777 > /dev/null 2>&1 & echo done") == Result(0, "done\n", "")
    assert "sleep 777" in inside(ctr, "ps").stdout
    # One that keeps the output open holds up nobody for ever.
    assert inside(ctr, "sleep 778 & echo done") == Result(0, "done\n", "")
    assert "sleep 778" in inside(ctr, "ps").stdout
    # What its parent leaves behind, PID 1 reaps: of the guest nothing is left to the agent.
    left = (
        "for n in $(seq 50); do sleep 0.5; found=$(grep -l '^State:.Z' /proc/[0-9]*/status);"
        ' [ -n "$found" ] || exit 0; done; echo "$found"'
    )
    assert inside(ctr, f"for n in 1 2 3 4 5 6 7 8 9; do (true &); done; {left}").stdout == ""
    assert runtime("exec", "--guest", "c", "--", "sh", "-c", left).stdout == ""


HOOK = """#!/bin/sh
cat > {directory}/state.{name}
echo {name} >> {directory}/order
echo "$HOW" > {directory}/env.{name}
{more}
"""


@pytest.fixture
def hook(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a hook's program, and return what config.json says of it."""

    def make(name: str, more: str = "", **fields: object) -> dict[str, Any]:
        path = tmp_path / name
        path.write_text(HOOK.format(directory=tmp_path, name=name, more=more))
        path.chmod(0o755)
        return {"path": str(path), "args": [name], "env": ["HOW=given", "PATH=/bin:/usr/bin"], **fields}

    return make


def test_hooks_of_the_host(
    ctr: Containerd, run: Run, hook: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    names = ["prestart", "createRuntime", "poststart", "poststop"]
    hooks = {name: [hook(name)] for name in names}
    assert run("/bin/true", hooks=hooks).status == 0
    assert (tmp_path / "order").read_text().split() == names
    states = {name: json.loads((tmp_path / f"state.{name}").read_text()) for name in names}
    assert {state["id"] for state in states.values()} == {"c"}
    assert states["prestart"]["status"] in ("creating", "created")
    assert Path(states["prestart"]["bundle"]).name == "c"
    assert {(tmp_path / f"env.{name}").read_text() for name in names} == {"given\n"}


@pytest.mark.parametrize("name", ["prestart", "createRuntime"])
def test_a_hook_that_fails_hinders_the_container(
    ctr: Containerd, runtime: Runtime, run: Run, hook: Callable[..., dict[str, Any]], name: str
) -> None:
    done = run("/bin/true", hooks={name: [hook(name, more="echo no luck >&2; exit 4")]})
    assert (done.status, f"{name}: exit status 4: no luck" in done.stderr) == (1, True), done
    assert ctr.tasks() == {}
    assert runtime("list", "--json").json == []


def test_a_hook_that_hangs_is_ended_with_what_it_has_started(
    ctr: Containerd, runtime: Runtime, run: Run, hook: Callable[..., dict[str, Any]]
) -> None:
    seconds = f"98765{os.getpid()}"  # a word that no other process of the host has
    done = run("/bin/true", hooks={"prestart": [hook("prestart", more=f"sleep {seconds}", timeout=1)]})
    assert (done.status, "prestart: not done within 1 s" in done.stderr) == (1, True), done
    assert runtime("list", "--json").json == []
    assert not [line for line in Path("/proc").glob("[0-9]*/cmdline") if seconds.encode() in _read(line)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_late_hook_that_fails_hinders_nothing(
    ctr: Containerd, run: Run, hook: Callable[..., dict[str, Any]]
) -> None:
    hooks = {name: [hook(name, more="exit 4")] for name in ("poststart", "poststop")}
    assert run("/bin/sh", "-c", "exit 5", hooks=hooks).status == 5
