"""Containers without containerd: `run --rootfs`, and `exec` into them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factory import configure, serving
from tests.rootfs import add_program, make_rootfs
from tests.started import PATIENCE, UNDER_INIT, write_config
from tests.support import Result, Runtime

EMULATED = ("no usable KVM on this host: ", "as configured: ")
SLOW = "QEMU emulates (TCG), which is slow\n"


@pytest.fixture(scope="module")
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    return make_rootfs(root / "own rootfs")


def run(runtime: Runtime, rootfs: Path, *words: str, stdin: bytes = b"") -> Result:
    """Run a container to its end; what is said of the emulation is left out."""
    done = runtime("run", "--rootfs", str(rootfs), *words, stdin=stdin)
    said = done.stderr
    for why in EMULATED:
        said = said.replace(why + SLOW, "")
    return Result(done.status, done.stdout, said)


def test_a_command_runs_in_its_own_root(runtime: Runtime, rootfs: Path) -> None:
    done = run(runtime, rootfs, "c1", "/bin/sh", "-c", "cat; echo err >&2; ls /; exit 5", stdin=b"given\n")
    assert done == Result(5, "given\nbin\ndev\netc\nproc\nroot\nsys\ntmp\n", "err\n")
    assert runtime("list", "--json").json == []


def test_environment_and_directory(runtime: Runtime, rootfs: Path) -> None:
    done = run(runtime, rootfs, "--env", "A=b c", "--cwd", "/tmp", "c1", "sh", "-c", "echo $A; pwd")
    assert done == Result(0, "b c\n/tmp\n", "")


@pytest.fixture
def detached(runtime: Runtime, rootfs: Path) -> Iterator[str]:
    """A sandbox with a container that sleeps."""
    assert run(runtime, rootfs, "--detach", "c2", "/bin/sleep", "1000") == Result(0, "", "")
    yield "c2"
    assert runtime("delete", "--force", "c2") == Result(0, "", "")


def test_exec_enters_the_container(runtime: Runtime, detached: str) -> None:
    inside = runtime("exec", detached, "--", "sh", "-c", "ps; exit 3")
    assert inside.status == 3
    assert "/bin/sleep 1000" in inside.stdout
    assert "kata-agent" not in inside.stdout
    outside = runtime("exec", "--guest", detached, "--", "ls", "/run/kata-containers")
    assert "c2" in outside.stdout.split()
    assert runtime("exec", detached, "--", "nowhere").status == 127


def test_routes_of_the_guest_are_the_containers(runtime: Runtime, detached: str) -> None:
    nic = (
        '{"device":"tap-c2","name":"eth-c2","IPAddresses":[{"address":"172.16.0.3","mask":"16"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6f:a3:69"}'
    )
    assert runtime("kata-network", "add-iface", detached, "-", stdin=nic).status == 0
    shown = runtime("exec", detached, "--", "ip", "route").stdout
    assert shown == "172.16.0.0/16 dev eth-c2 scope link  src 172.16.0.3 \n"
    assert runtime("kata-network", "del-iface", detached, "-", stdin='{"name":"eth-c2"}').stdout == "null\n"


def test_the_documents_line_in_the_container(runtime: Runtime, root: Path) -> None:
    """What the how-to's `ip route` says, by iproute2 as there."""
    rootfs = make_rootfs(root / "rootfs with ip")
    add_program(rootfs, "ip")
    assert run(runtime, rootfs, "--detach", "c3", "/bin/sleep", "1000") == Result(0, "", "")
    nic = (
        '{"device":"tap-test","name":"eth-test","IPAddresses":[{"address":"172.16.0.3","mask":"16"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6f:a3:69"}'
    )
    assert runtime("kata-network", "add-iface", "c3", "-", stdin=nic).status == 0
    line = "172.16.0.0/16 dev eth-test proto kernel scope link src 172.16.0.3 \n"
    assert runtime("exec", "c3", "--", "ip", "route") == Result(0, line, "")
    assert runtime("delete", "--force", "c3") == Result(0, "", "")


def test_what_the_container_writes_is_the_hosts(runtime: Runtime, rootfs: Path) -> None:
    script = "echo content > /tmp/file; chown 12:34 /tmp/file; chmod 4751 /tmp/file; ln -s /etc /tmp/link"
    assert run(runtime, rootfs, "c1", "sh", "-c", script) == Result(0, "", "")
    path = rootfs / "tmp/file"
    status = path.stat()
    assert (path.read_text(), status.st_uid, status.st_gid, status.st_mode & 0o7777) == (
        "content\n",
        12,
        34,
        0o4751,
    )
    assert os.readlink(rootfs / "tmp/link") == "/etc"
    path.unlink()
    (rootfs / "tmp/link").unlink()


def test_a_caller_that_goes_takes_the_container_along(runtime: Runtime, rootfs: Path) -> None:
    process = runtime.start("run", "--rootfs", str(rootfs), "c1", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert runtime("list", "--json").json == []


def test_the_other_machine(root: Path, tmp_path: Path, rootfs: Path) -> None:
    config = write_config(tmp_path / "configuration.toml", accelerator="tcg", machine_type="pc")
    done = run(Runtime(root, config), rootfs, "c1", "sh", "-c", "ls /; exit 3")
    assert done == Result(3, "bin\ndev\netc\nproc\nroot\nsys\ntmp\n", "")


def test_a_machine_that_was_kept_ready(root: Path, tmp_path: Path, rootfs: Path) -> None:
    """What is shared moves along with it."""
    runtime = Runtime(root, configure(tmp_path / "configuration.toml", tmp_path, default_memory=512))
    with serving(runtime, tmp_path / "run/cache.sock") as factory:
        factory.until_full()
        done = run(runtime, rootfs, "c1", "sh", "-c", "echo kept > /tmp/kept; cat /tmp/kept; exit 3")
        assert done == Result(3, "kept\n", "")
        factory.until_full(handed_over=1)
    assert runtime("factory", "destroy").status == 0
    (rootfs / "tmp/kept").unlink()


@pytest.mark.parametrize("given", ["/nowhere", "/etc/passwd"])
def test_a_root_that_is_none(runtime: Runtime, given: str) -> None:
    done = runtime("run", "--rootfs", given, "c1", "true")
    assert done.status == 1
    assert given in done.stderr
    assert runtime("list", "--json").json == []


def test_an_agent_that_is_not_pid_1(root: Path, rootfs: Path, tmp_path: Path) -> None:
    """What a container runtime leaves behind is the agent's, not the init's: it is seen to end."""
    config = write_config(tmp_path / "configuration.toml", accelerator="tcg", kernel_params=UNDER_INIT)
    done = run(Runtime(root, config), rootfs, "c1", "sh", "-c", "exit 7")
    assert done == Result(7, "", "")


def test_addresses_are_random_in_a_container(runtime: Runtime, detached: str) -> None:
    """Its runtime's are not, where the processor is emulated; that personality is nobody else's."""
    where = {
        runtime("exec", detached, "--", "sh", "-c", "grep stack /proc/self/maps").stdout for _ in range(3)
    }
    assert len(where) == 3
    first = runtime("exec", detached, "--", "cat", "/proc/1/personality", "/proc/self/personality")
    assert first == Result(0, "00000000\n00000000\n", "")
