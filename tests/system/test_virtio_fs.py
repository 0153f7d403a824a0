"""shared_fs = "virtio-fs": who serves a sandbox's files, with what rights, how long; and where it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kata_shim.qemu.process import find_by_log
from tests.factory import configure, serving
from tests.rootfs import make_rootfs
from tests.started import PATIENCE, kill, shims, watched, write_config
from tests.support import Result, Runtime

SLOW = "as configured: QEMU emulates (TCG), which is slow\n"
LOST = "virtiofsd has ended, so that nobody serves the guest's files, and QEMU was ended"
DAEMON = "/usr/lib/qemu/virtiofsd"
# chown 0, dac_override 1, fowner 3, fsetid 4, setgid 6, setuid 7, setfcap 31 of linux/capability.h.
FOR_FILES = f"{1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31:016x}"
BROKEN = "#!/bin/sh\necho one word >&2\necho the last word >&2\nexit 3\n"
MUTE = "#!/bin/sh\nexec sleep 1000\n"


@pytest.fixture(scope="module")
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    return make_rootfs(root / "rootfs of virtio-fs")


@pytest.fixture
def configured(root: Path, tmp_path: Path) -> Callable[..., Runtime]:
    """Return the CLI with a configuration of virtio-fs and these fields beside."""

    def configure(**fields: str | int | bool) -> Runtime:
        given = {"accelerator": "tcg", "shared_fs": "virtio-fs", **fields}
        return Runtime(root, write_config(tmp_path / "configuration.toml", **given))

    return configure


@contextmanager
def holding(runtime: Runtime, rootfs: Path) -> Iterator[str]:
    """A sandbox with a container that sleeps."""
    command = ("run", "--detach", "--rootfs", str(rootfs), "files", "/bin/sleep", "1000")
    assert runtime(*command) == Result(0, "", SLOW)
    try:
        yield "files"
    finally:
        assert runtime("delete", "--force", "files") == Result(0, "", "")


@contextmanager
def empty(runtime: Runtime) -> Iterator[str]:
    """A sandbox without containers."""
    assert runtime("run", "--detach", "files") == Result(0, "", SLOW)
    try:
        yield "files"
    finally:
        assert runtime("delete", "--force", "files") == Result(0, "", "")


def servers(root: Path, sandbox_id: str = "files") -> list[int]:
    """The sandbox's virtiofsd: the process that waits, and the one that serves."""
    return sorted(
        (pid for pid, _ in find_by_log(root / "sandboxes" / sandbox_id / "virtiofsd.log")),
        key=lambda pid: len(status(pid)["NSpid"].split()),
    )


def status(pid: int) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_container_on_virtio_fs(configured: Callable[..., Runtime], rootfs: Path) -> None:
    script = "grep -c '^none / virtiofs ' /proc/mounts; cat; echo content > /tmp/file; chown 12:34 /tmp/file"
    runtime = configured()
    done = runtime("run", "--rootfs", str(rootfs), "files", "sh", "-c", f"{script}; exit 5", stdin=b"given\n")
    assert done == Result(5, "1\ngiven\n", SLOW)
    made = (rootfs / "tmp/file").stat()
    assert ((rootfs / "tmp/file").read_text(), made.st_uid, made.st_gid) == ("content\n", 12, 34)
    (rootfs / "tmp/file").unlink()
    assert runtime("list", "--json").json == []


@pytest.mark.parametrize(("cache", "machine"), [("none", "pc"), ("always", "q35")])
def test_what_the_guest_may_cache(
    configured: Callable[..., Runtime], rootfs: Path, cache: str, machine: str
) -> None:
    runtime = configured(virtio_fs_cache=cache, machine_type=machine)
    with holding(runtime, rootfs) as sandbox_id:
        (rootfs / "tmp/changing").write_text("before\n")
        assert runtime("exec", sandbox_id, "--", "cat", "/tmp/changing").stdout == "before\n"
        (rootfs / "tmp/changing").write_text("afterwards\n")
        shown = runtime("exec", sandbox_id, "--", "cat", "/tmp/changing").stdout
        # What the guest may always cache it need not: that is told by the option alone.
        assert shown == "afterwards\n" or cache == "always"
        words = Path(f"/proc/{servers(runtime.root)[0]}/cmdline").read_text().split("\0")
        assert f"cache={cache}" in words[words.index("-o") + 1].split(",")
    (rootfs / "tmp/changing").unlink()


def test_few_rights(configured: Callable[..., Runtime], rootfs: Path) -> None:
    """The one that serves has a root, processes and a network of its own, and cannot gain anything."""
    runtime = configured()
    with holding(runtime, rootfs) as sandbox_id:
        waits, serves = servers(runtime.root)
        rights = status(serves)
        assert (rights["CapPrm"], rights["CapEff"], rights["CapBnd"]) == (FOR_FILES, FOR_FILES, "0" * 16)
        assert (rights["NoNewPrivs"], rights["Seccomp"]) == ("1", "2")
        assert {status(waits)[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
        for kind in ("mnt", "net", "pid"):
            assert os.readlink(f"/proc/{serves}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind
        seen = [line.split()[4:6] for line in Path(f"/proc/{serves}/mountinfo").read_text().splitlines()]
        assert [point for point, _ in seen] == ["/", "/files/rootfs"]
        assert all("nodev" in options.split(",") for _, options in seen)
        assert seen[0][1].split(",")[0] == "ro"
        assert os.listdir(f"/proc/{serves}/root") == ["files"]
        qemu = runtime("state", sandbox_id).json["pid"]
        assert "9p" not in Path(f"/proc/{qemu}/cmdline").read_text()
        assert {status(qemu)[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}


@pytest.mark.parametrize("which", [0, 1], ids=["waits", "serves"])
def test_without_virtiofsd_the_sandbox_ends(
    configured: Callable[..., Runtime], rootfs: Path, which: int
) -> None:
    """The guest would wait for its files for ever; who asks is told."""
    runtime = configured()
    with holding(runtime, rootfs) as sandbox_id:
        with watched(runtime("state", sandbox_id).json["pid"]) as qemu_ended:
            kill(servers(runtime.root)[which])
            assert qemu_ended(PATIENCE)
        how = ["ended by signal 9", "exit status 1"][which]
        assert (
            f"{LOST}: virtio_fs_daemon: {DAEMON}: {how}\n" in runtime("exec", sandbox_id, "--", "true").stderr
        )
        assert runtime("state", sandbox_id).json["cause"].startswith(LOST)
        assert servers(runtime.root) == []


def test_the_next_shim_takes_it_over(configured: Callable[..., Runtime]) -> None:
    runtime = configured()
    with empty(runtime) as sandbox_id:
        (shim,) = shims(runtime.root, sandbox_id)
        served = servers(runtime.root)
        kill(shim)
        state = runtime("state", sandbox_id).json
        assert (state["status"], servers(runtime.root)) == ("running", served)
        with watched(state["pid"]) as qemu_ended:
            kill(served[1])
            assert qemu_ended(PATIENCE)
        assert runtime("state", sandbox_id).json["cause"].startswith(LOST)


def test_it_ends_while_no_shim_watches(configured: Callable[..., Runtime]) -> None:
    runtime = configured()
    with empty(runtime) as sandbox_id:
        pid = runtime("state", sandbox_id).json["pid"]
        with watched(pid) as qemu_ended:
            kill(shims(runtime.root, sandbox_id)[0])
            for server in servers(runtime.root):
                kill(server)
            state = runtime("state", sandbox_id).json
            assert (state["status"], LOST in state["cause"]) == ("stopped", True), state
            assert qemu_ended(PATIENCE)


def test_a_dead_shims_containers_take_it_along(configured: Callable[..., Runtime], rootfs: Path) -> None:
    runtime = configured()
    with holding(runtime, rootfs) as sandbox_id, ExitStack() as stack:
        ends = [stack.enter_context(watched(pid)) for pid in servers(runtime.root)]
        kill(shims(runtime.root, sandbox_id)[0])
        assert runtime("state", sandbox_id).json["status"] == "stopped"
        assert all(ended(PATIENCE) for ended in ends)
        assert len(ends) == 2


def test_a_shim_that_dies_while_it_starts_one(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    """That virtiofsd never hears of a QEMU: `delete` finds it all the same."""
    (tmp_path / "mute").write_text(MUTE)
    (tmp_path / "mute").chmod(0o755)
    runtime = configured(virtio_fs_daemon=str(tmp_path / "mute"))
    with runtime.start("run", "--detach", "files") as called:
        while not (found := servers(runtime.root)):
            assert called.poll() is None
        with watched(found[0]) as ended:
            kill(shims(runtime.root, "files")[0])
            called.communicate(timeout=PATIENCE)
            assert runtime("delete", "--force", "files") == Result(0, "", "")
            assert ended(PATIENCE)


# It cannot be had


def refused(runtime: Runtime) -> str:
    """Run; it fails with one line, and nothing of the sandbox is left."""
    answer = runtime("run", "--detach", "files")
    assert (answer.status, answer.stdout, answer.stderr.count("\n")) == (1, "", 1), answer
    assert not (runtime.root / "sandboxes/files").exists()
    return answer.stderr.rstrip("\n").replace(str(runtime.config), "FILE")


@pytest.mark.parametrize(
    ("daemon", "trouble"),
    [
        ("/no/virtiofsd", "cannot be used: No such file or directory"),
        ("/etc/passwd", "must not be executed"),
        ("/usr/lib/qemu", "is not a regular file"),
    ],
)
def test_no_such_program(configured: Callable[..., Runtime], daemon: str, trouble: str) -> None:
    runtime = configured(virtio_fs_daemon=daemon)
    sentence = f"FILE:4: [hypervisor.qemu] virtio_fs_daemon: {daemon} (virtiofsd) {trouble}; install it"
    assert refused(runtime).startswith(sentence)
    checked = runtime("kata-check", "--json").json
    assert not checked["ok"]
    assert daemon in checked["problems"][0]


def test_a_program_that_fails_at_once(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    (tmp_path / "broken").write_text(BROKEN)
    (tmp_path / "broken").chmod(0o755)
    said = refused(configured(virtio_fs_daemon=str(tmp_path / "broken")))
    assert said == f"virtio_fs_daemon: {tmp_path}/broken: exit status 3: the last word"


def test_a_program_that_never_answers(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    (tmp_path / "mute").write_text(MUTE)
    (tmp_path / "mute").chmod(0o755)
    said = refused(configured(virtio_fs_daemon=str(tmp_path / "mute"), agent_timeout=2))
    assert "no QMP greeting within 2 s" in said


def test_there_is_no_dax_window(configured: Callable[..., Runtime]) -> None:
    assert refused(configured(virtio_fs_cache_size=1024)) == (
        "FILE:4: [hypervisor.qemu] virtio_fs_cache_size: 1024; Debian's QEMU has no DAX window,"
        " and so there is none here: set it to 0"
    )


# The cache


def test_a_machine_that_was_kept_ready(root: Path, tmp_path: Path, rootfs: Path) -> None:
    """It brings its virtiofsd along; one without is passed over, and another configuration's is not taken."""
    config = tmp_path / "configuration.toml"
    runtime = Runtime(root, configure(config, tmp_path, 1, clone=False, shared_fs="virtio-fs"))
    other = tmp_path / "other.toml"
    other.write_text(config.read_text().replace("[factory]", 'virtio_fs_cache = "none"\n[factory]'))
    with serving(runtime, tmp_path / "run/cache.sock") as factory:
        factory.until_full()
        done = runtime("run", "--rootfs", str(rootfs), "files", "sh", "-c", "echo kept > /tmp/kept; exit 3")
        assert done == Result(3, "", SLOW)
        factory.until_full(handed_over=1)
        assert Runtime(root, other)("run", "--detach", "files") == Result(0, "", SLOW)
        assert runtime("state", "files").json["source"] == "boot"
        assert runtime("delete", "--force", "files") == Result(0, "", "")
        for pid, _ in find_by_log(*root.glob("factory/vms/*/virtiofsd.log")):
            kill(pid)
        with empty(runtime) as sandbox_id:
            assert runtime("state", sandbox_id).json["source"] == "boot"
    assert runtime("factory", "destroy").status == 0
    assert (rootfs / "tmp/kept").read_text() == "kept\n"
    (rootfs / "tmp/kept").unlink()
