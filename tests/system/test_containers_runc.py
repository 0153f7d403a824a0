"""Containers run by runc, in a guest that was made with it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rootfs import make_rootfs
from tests.started import write_config
from tests.support import PROJECT, Result, Runtime
from tests.typist import at


@pytest.fixture(scope="module")
def runtime(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The CLI, with a guest that has runc and no crun."""
    directory = tmp_path_factory.mktemp("runc")
    program = str(PROJECT / "scripts/build-guest")
    subprocess.run([program, "--runtime", "runc", "--output", f"{directory}/guest"], check=True)
    config = write_config(
        directory / "configuration.toml",
        root / "template",
        accelerator="tcg",
        kernel=f"{directory}/guest/vmlinux",
        initrd=f"{directory}/guest/initrd",
    )
    return Runtime(root, config)


@pytest.fixture(scope="module")
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    return make_rootfs(root / "rootfs of runc")


@pytest.fixture
def container(runtime: Runtime, rootfs: Path) -> Iterator[str]:
    """A sandbox with a container that sleeps."""
    assert runtime("run", "--detach", "--rootfs", str(rootfs), "r1", "/bin/sleep", "1000").status == 0
    yield "r1"
    assert runtime("delete", "--force", "r1") == Result(0, "", "")


def test_streams_and_status(runtime: Runtime, rootfs: Path) -> None:
    script = "cat; echo err >&2; exit 5"
    done = runtime("run", "--rootfs", str(rootfs), "r1", "sh", "-c", script, stdin=b"given\n")
    assert (done.status, done.stdout) == (5, "given\n")
    assert done.stderr.endswith("err\n")
    assert runtime("list", "--json").json == []


def test_it_is_runc(runtime: Runtime, container: str) -> None:
    assert runtime("exec", "--guest", container, "--", "runc", "--version").stdout.startswith("runc version ")
    assert runtime("exec", "--guest", container, "--", "crun", "--version").status == 127


def test_exec(runtime: Runtime, container: str) -> None:
    done = runtime("exec", "--env", "A=b", "--cwd", "/tmp", container, "--", "sh", "-c", "ps; pwd; exit $A")
    assert "/bin/sleep 1000" in done.stdout
    assert done.stdout.endswith("/tmp\n")
    assert runtime("exec", container, "--", "sh", "-c", "kill -9 $$").status == 137


@pytest.mark.parametrize(("command", "status"), [("nowhere", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_run(
    runtime: Runtime, container: str, rootfs: Path, command: str, status: int
) -> None:
    refused = runtime("exec", container, "--", command)
    assert (refused.status, command in refused.stderr) == (status, True)
    assert refused.stderr.startswith("runc exec: ")
    assert refused.stderr.count("\n") == 1


def test_terminal(runtime: Runtime, container: str) -> None:
    with at(runtime, "exec", "-t", container, "--", "sh", "-c", "stty size; tty; read x; exit $x") as typist:
        typist.until(b"31 97\r\n/dev/pts/0\r\n")
        typist.press(b"7\r")
        assert typist.end() == 7
