"""A sandbox's life by the CLI: run, list, state, delete, kata-check, version. Its commands: test_exec.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import kata_shim
from tests.started import CLEARED, PATIENCE, Started, kill, shims, watched, write_config
from tests.support import Guest, Result, Runtime, shipped

# Every character that an id may have, in two ids of the greatest length.
LONG_ID = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_.-0123456789" + "a" * 25
OTHER_ID = "abcdefghijklmnopqrstuvwxyz" + "-" * 38
EMULATED = "no usable KVM on this host: QEMU emulates (TCG), which is slow\n"
POWER_OFF = ("sh", "-c", "echo o > /proc/sysrq-trigger; exec sleep 1000")
STEPS = {
    "clone": ("finding the accelerator", "cloning the template"),
    "boot": ("finding the accelerator", "starting QEMU", "booting the guest"),
}


@pytest.fixture(scope="module")
def runtime(root: Path) -> Iterator[Runtime]:
    """The CLI on a root of its own: these tests look at all that is there."""
    own = root / "lifecycle"
    own.mkdir(mode=0o700)
    yield Runtime(own, shipped(root))
    assert os.listdir(own / "sandboxes") == []
    shutil.rmtree(own)


@pytest.fixture(scope="module")
def guest(runtime: Runtime) -> Iterator[Guest]:
    """One running sandbox for all tests of this module, under the longest id there is."""
    started = runtime("run", "--detach", LONG_ID)
    assert (started.status, started.stdout) == (0, ""), started
    yield Guest(runtime, LONG_ID)
    assert runtime("delete", "--force", LONG_ID) == Result(0, "", "")


@pytest.fixture(autouse=True)
def no_other(runtime: Runtime, guest: Guest) -> Iterator[None]:
    """A test that fails half way through the life of its sandbox fails alone."""
    yield
    runtime("delete", "--force", "a")


TRIES = 5


@dataclass(frozen=True)
class Way:
    """How a sandbox starts: the command that does it, and what is shown meanwhile."""

    run: tuple[str, ...]
    steps: tuple[str, ...]


@pytest.fixture(params=STEPS)
def way(root: Path, request: pytest.FixtureRequest) -> Way:
    """Each of the ways in turn."""
    clone = request.param == "clone"
    config = shipped(root) if clone else shipped(root, enable_template=False)
    return Way(("run", "--config", str(config)), STEPS[request.param])


@pytest.fixture(scope="module")
def accelerator(guest: Guest) -> str:
    """The accelerator that was found out for this host."""
    return str(guest.runtime("state", guest.id).json["accelerator"])


def ids(runtime: Runtime) -> list[str]:
    """The sandboxes that have a directory."""
    return sorted(os.listdir(runtime.root / "sandboxes"))


# run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_attached_run_ends_by_signal(runtime: Runtime, guest: Guest, number: signal.Signals) -> None:
    """It stays until the signal, which is its ordinary end; then the sandbox is gone."""
    run = Started(runtime, "run", "a")
    run.until(CLEARED)
    pid = runtime("state", "a").json["pid"]
    with watched(pid) as ended:
        run.signal(number)
        assert run.end() == 0
        assert ended()
    assert ids(runtime) == [guest.id]


def test_attached_run_ends_with_its_guest(runtime: Runtime, guest: Guest, accelerator: str) -> None:
    with runtime.start("run", "a") as run:
        powered_off = _wait_and(runtime, "a", *POWER_OFF)
        out, err = run.communicate(timeout=60)
    assert powered_off.stderr == "the guest has powered off\n"
    assert (run.returncode, out.decode(), err.decode()) == (0, "", _warning(accelerator))
    assert ids(runtime) == [guest.id]


def _wait_and(runtime: Runtime, sandbox_id: str, *command: str) -> Result:
    """Run a command in a guest as soon as there is one: the shim answers when the sandbox is started."""
    while not (runtime.root / "sandboxes" / sandbox_id / "shim.sock").exists():
        os.sched_yield()
    return runtime("exec", sandbox_id, "--", *command)


def _warning(accelerator: str) -> str:
    return EMULATED if accelerator == "tcg" else ""


def test_progress_is_one_line_of_a_terminal(
    runtime: Runtime, guest: Guest, accelerator: str, way: Way
) -> None:
    """Each step replaces the one before, and at the end the line is as if nothing had been there."""
    run = Started(runtime, *way.run, "--detach", "a")
    assert run.end() == 0
    steps = [way.steps[0], f"{way.steps[1]} ({accelerator})", *way.steps[2:]]
    shown = "".join(f"\r{step}\x1b[K" for step in steps)
    warning = CLEARED + _warning(accelerator) if accelerator == "tcg" else ""
    assert run.shown == shown + warning + CLEARED
    assert runtime("delete", "--force", "a") == Result(0, "", "")


def test_detached_run_outlives_its_caller(runtime: Runtime, guest: Guest, accelerator: str) -> None:
    """Neither the shim nor QEMU is in the caller's session, holds its descriptors, or hears its signals."""
    caller = subprocess.Popen(
        ["setsid", "--wait", *runtime.command("run", "--detach", "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=runtime.environment,
    )
    # communicate() returns at the end of both pipes: nobody else may have kept them open.
    out, err = caller.communicate(timeout=60)
    assert (caller.returncode, out.decode(), err.decode()) == (0, "", _warning(accelerator))
    state = runtime("state", "a").json
    for pid in (state["pid"], state["shimPid"]):
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert runtime("delete", "--force", "a") == Result(0, "", "")


def _interrupted(runtime: Runtime, way: Way, step: str, number: signal.Signals) -> int:
    """Start `a`, send a signal at a step, and return the exit status: 0 where it was quicker than we."""
    run = Started(runtime, *way.run, "--detach", "a")
    run.until(step)
    run.signal(number)
    return run.end()


def test_interrupted_start_leaves_nothing(runtime: Runtime, guest: Guest, way: Way) -> None:
    for step in way.steps:
        for _ in range(TRIES):
            if status := _interrupted(runtime, way, step, signal.SIGINT):
                break
            assert runtime("delete", "--force", "a") == Result(0, "", "")
        assert status == 130
        assert ids(runtime) == [guest.id]


def test_caller_killed_while_it_starts_leaves_nothing(runtime: Runtime, guest: Guest, way: Way) -> None:
    for step in way.steps:
        for _ in range(TRIES):
            if status := _interrupted(runtime, way, step, signal.SIGKILL):
                break
            assert runtime("delete", "--force", "a") == Result(0, "", "")
        assert status == -signal.SIGKILL
        for shim in shims(runtime.root, "a"):
            with suppress(ProcessLookupError), watched(shim) as ended:
                assert ended(PATIENCE)
        assert ids(runtime) == [guest.id]


def test_shim_killed_while_it_starts_leaves_nothing(runtime: Runtime, guest: Guest, way: Way) -> None:
    for step in way.steps:
        run = Started(runtime, *way.run, "a")
        run.until(step)
        kill(*shims(runtime.root, "a"))
        assert run.end() == 1
        assert run.shown.endswith("\n")
        assert run.shown.rpartition(CLEARED)[2].startswith("the shim of a ended before it answered")
        assert ids(runtime) == [guest.id]


def test_two_runs_with_one_id(runtime: Runtime, guest: Guest, accelerator: str) -> None:
    both = [runtime.start("run", "--detach", "a") for _ in range(2)]
    ends = [(run.communicate(timeout=60), run.returncode) for run in both]
    assert sorted((status, out.decode(), err.decode()) for (out, err), status in ends) == [
        (0, "", _warning(accelerator)),
        (1, "", "id: a is in use\n"),
    ]
    assert runtime("state", "a").json["status"] == "running"
    assert runtime("delete", "--force", "a") == Result(0, "", "")


# ids


@pytest.mark.parametrize("sandbox_id", ["a", LONG_ID[:63] + "Z", OTHER_ID, "...", "-", "--"])
def test_id_that_is_one(runtime: Runtime, guest: Guest, tmp_path: Path, sandbox_id: str) -> None:
    """What is wrong then is something else, and nothing is left."""
    config = tmp_path / "none.toml"
    assert runtime("run", "--detach", "--config", str(config), "--", sandbox_id) == Result(
        1, "", f"{config}: no such file; name the configuration with --config\n"
    )
    assert ids(runtime) == [guest.id]


@pytest.mark.parametrize("sandbox_id", ["", ".", "..", "/", "a/b", "../a", "a\n", "\n", " ", "ä", "a" * 65])
def test_id_that_is_none(runtime: Runtime, guest: Guest, sandbox_id: str) -> None:
    shown = sandbox_id.replace("\n", "\\n")
    message = f"id: {shown} is not 1 to 64 of A-Z a-z 0-9 _ . - (and . and .. are none)\n"
    assert runtime("run", "--detach", sandbox_id) == Result(1, "", message)
    message = f"no such container ID ({shown})\n" if sandbox_id else "Missing container ID\n"
    for command in ("state", "delete"):
        assert runtime(command, sandbox_id) == Result(1, "", message)
    assert ids(runtime) == [guest.id]


def test_id_by_a_prefix(runtime: Runtime, guest: Guest) -> None:
    (runtime.root / "sandboxes" / f"{guest.id[:9]}x").mkdir()
    try:
        assert runtime("state", guest.id[:10]).json["id"] == guest.id
        assert runtime("state", "A") == Result(1, "", "multiple containers found (A)\n")
        assert runtime("state", "B") == Result(1, "", "no such container ID (B)\n")
    finally:
        (runtime.root / "sandboxes" / f"{guest.id[:9]}x").rmdir()


# list, state


def test_state(runtime: Runtime, guest: Guest, accelerator: str) -> None:
    """One JSON object, its keys in this order, the first four the OCI runtime specification's."""
    answer = runtime("state", guest.id)
    state = answer.json
    words = Path(f"/proc/{state['pid']}/cmdline").read_text().split("\0")
    assert f"{guest.id},debug-threads=on" in words
    assert [state["shimPid"]] == shims(runtime.root, guest.id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", state["created"])
    assert state["source"] in ("boot", "template")
    known = {
        "ociVersion": "1.0.2",
        "id": guest.id,
        "status": "running",
        "pid": state["pid"],
        "shimPid": state["shimPid"],
        "created": state["created"],
        "accelerator": accelerator,
        "source": state["source"],
        "config": str(runtime.config),
        "ifaces": 0,
    }
    assert answer == Result(0, json.dumps(known, separators=(",", ":")) + "\n", "")


def test_list(runtime: Runtime, guest: Guest) -> None:
    state = runtime("state", guest.id)
    assert runtime("list", "--json") == Result(0, f"[{state.stdout.strip()}]\n", "")
    pid, accelerator, created = (str(state.json[key]) for key in ("pid", "accelerator", "created"))
    assert runtime("list") == Result(
        0,
        f"{'ID':64}  STATE    {'PID':{len(pid)}}  ACCELERATOR  CREATED\n"
        f"{guest.id}  running  {pid}  {accelerator}          {created}\n",
        "",
    )


def test_list_of_nothing(tmp_path: Path, runtime: Runtime) -> None:
    empty = Runtime(tmp_path / "none", runtime.config)
    assert empty("list") == Result(0, "ID  STATE  PID  ACCELERATOR  CREATED\n", "")
    assert empty("list", "--json") == Result(0, "[]\n", "")
    assert not empty.root.exists()


# delete


def test_delete_of_a_running_sandbox_needs_force(runtime: Runtime, guest: Guest) -> None:
    message = f"sandbox {guest.id} is running; stop it first, or delete it with --force\n"
    assert runtime("delete", guest.id) == Result(1, "", message)
    assert runtime("state", guest.id).json["status"] == "running"


def test_delete_of_what_is_not_there(runtime: Runtime, guest: Guest) -> None:
    assert runtime("delete", "b") == Result(1, "", "no such container ID (b)\n")
    assert runtime("delete", "--force", "b") == Result(0, "", "")


def test_life_after_power_off(runtime: Runtime, guest: Guest) -> None:
    """A stopped sandbox can be looked at, refuses what needs a guest, and goes without --force."""
    assert runtime("run", "--detach", "a").status == 0
    pid = runtime("state", "a").json["pid"]
    with watched(pid) as ended:
        assert runtime("exec", "a", "--", *POWER_OFF).status == 1
        assert ended(30)
    state = runtime("state", "a").json
    assert (state["status"], state["pid"], "cause" in state) == ("stopped", 0, False)
    assert runtime("list").stdout.splitlines()[2].split()[:3] == ["a", "stopped", "-"]
    assert runtime("exec", "a", "--", "true") == Result(1, "", "sandbox a is stopped\n")
    assert runtime("kata-network", "list-ifaces", "a") == Result(1, "null\n", "sandbox a is stopped\n")
    assert runtime("run", "--detach", "a") == Result(1, "", "id: a is in use\n")
    assert runtime("delete", "a") == Result(0, "", "")
    assert ids(runtime) == [guest.id]


def test_two_deletes_at_once(runtime: Runtime, guest: Guest) -> None:
    assert runtime("run", "--detach", "a").status == 0
    both = [runtime.start("delete", "--force", "a") for _ in range(2)]
    ends = [(run.communicate(timeout=60), run.returncode) for run in both]
    assert [status for _, status in ends] == [0, 0], ends
    assert ids(runtime) == [guest.id]


# version, kata-check


def test_version(runtime: Runtime) -> None:
    text = f"kata-runtime  : {kata_shim.__version__}\n   OCI specs: 1.0.2\n"
    assert runtime("version") == runtime("--version") == Result(0, text, "")


def test_kata_check(runtime: Runtime, guest: Guest, accelerator: str) -> None:
    answer = runtime("kata-check", "--json")
    found = answer.json
    assert (answer.status, answer.stderr, found["ok"], found["problems"]) == (0, "", True, [])
    assert (found["accelerator"], found["config"]) == (accelerator, str(runtime.config))
    assert found["qemu"].startswith("QEMU emulator version ")
    for name, device in (("kvm", "/dev/kvm"), ("tun", "/dev/net/tun"), ("vsock", "/dev/vhost-vsock")):
        assert found[name] == os.access(device, os.R_OK | os.W_OK)
    text = runtime("kata-check")
    assert (text.status, text.stderr) == (0, "")
    lines = dict(re.split(r" *: ", line, maxsplit=1) for line in text.stdout.splitlines())
    assert lines == {
        key: {True: "yes", False: "no"}.get(value, value) for key, value in found.items() if key != "problems"
    }


def test_kata_check_of_what_cannot_run(runtime: Runtime, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", accelerator="tcg", kernel="/none")
    problem = f"{config}:3: [hypervisor.qemu] kernel: /none (the guest's kernel) cannot be used: No such file"
    problem += " or directory; make it with scripts/build-guest, or correct the field"
    answer = runtime("kata-check", "--json", "--config", str(config))
    assert (answer.status, answer.stderr) == (1, "")
    assert (answer.json["ok"], answer.json["problems"]) == (False, [problem])


def test_explicit_accelerator_needs_no_trial(runtime: Runtime, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.toml", accelerator="tcg")
    other = Runtime(tmp_path / "root", config)
    found = other("kata-check", "--json").json
    assert (found["accelerator"], found["reason"]) == ("tcg", "configured")
    assert not (other.root / "accelerator.json").exists()


def test_the_trial_is_remembered(runtime: Runtime, guest: Guest) -> None:
    """Nobody waits for it twice: the second start begins its boot at once."""
    before = (runtime.root / "accelerator.json").stat()
    assert runtime("kata-check").status == 0
    assert (runtime.root / "accelerator.json").stat().st_ino == before.st_ino
