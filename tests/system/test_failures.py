"""The big parts fail: each time one clear message with the best cause, the right status, nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from kata_shim.qemu.cmdline import kernel_command_line
from tests.started import PATIENCE, Started, kill, taken, watched, write_config
from tests.support import Guest, Result, Runtime, settle

INITRD = Path("/var/lib/kata-shim/guest/initrd")
NIC = {"device": "tap-fail", "name": "eth-fail", "mtu": 1500, "hwAddr": "02:00:00:00:0f:01"}
PANIC = "the guest's kernel: Kernel panic - not syncing: "


@pytest.fixture(scope="module")
def accelerator(runtime: Runtime) -> str:
    """What this host runs guests with, found out once."""
    return str(runtime("kata-check", "--json").json["accelerator"])


@pytest.fixture
def configured(runtime: Runtime, tmp_path: Path, accelerator: str) -> Callable[..., Runtime]:
    """Return the CLI with a configuration.toml of just these fields, and no trial of the accelerator."""

    def configure(**fields: str | int | bool) -> Runtime:
        config = write_config(tmp_path / "c.toml", **{"accelerator": accelerator, **fields})
        return Runtime(runtime.root, config)

    return configure


def refused(runtime: Runtime) -> str:
    """Run; it fails with one line, and nothing of the sandbox is left."""
    answer = runtime("run", "--detach", "fail")
    assert (answer.status, answer.stdout) == (1, ""), answer
    assert answer.stderr.endswith("\n")
    assert answer.stderr.count("\n") == 1
    sandboxes = runtime.root / "sandboxes"
    assert not (sandboxes / "fail").exists()
    return answer.stderr.rstrip("\n").replace(str(runtime.config), "FILE")


@contextmanager
def booted(runtime: Runtime) -> Iterator[Guest]:
    """A sandbox that runs at first, and is deleted whatever has become of it."""
    started = runtime("run", "--detach", "fail")
    slow = "as configured: QEMU emulates (TCG), which is slow\n"
    assert started == Result(0, "", slow if 'accelerator = "tcg"' in runtime.config.read_text() else "")
    try:
        yield Guest(runtime, "fail")
    finally:
        assert runtime("delete", "--force", "fail") == Result(0, "", "")


# Configuration: file, line, field, value and rule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "/no/qemu"}, "path: /no/qemu (QEMU's program) cannot be used: No such file or directory;"),
        ({"path": "/etc/passwd"}, "path: /etc/passwd (QEMU's program) must not be executed;"),
        ({"kernel": "/no/kernel"}, "kernel: /no/kernel (the guest's kernel) cannot be used: No such file or"),
        ({"kernel": "/etc"}, "kernel: /etc (the guest's kernel) is not a regular file;"),
        ({"initrd": "/no/initrd"}, "initrd: /no/initrd (the guest's initrd) cannot be used: No such file or"),
        ({"firmware": "/no/bios"}, "firmware: /no/bios (the firmware) cannot be used: No such file or"),
        (
            {"entropy_source": "/no/rng"},
            "entropy_source: /no/rng (the entropy source) cannot be used: No such",
        ),
        (
            {"image": "/etc/passwd"},
            "image: this version boots an initrd only; leave image out and set initrd",
        ),
        (
            {"machine_type": "virt"},
            "machine_type: virt is a machine of ARM's; on this host it is one of q35, pc",
        ),
        ({"machine_type": "isa"}, 'machine_type: "isa" is not one of q35, pc, virt'),
        ({"default_vcpus": 9999}, "default_vcpus: 9999 is not within 1.."),
        ({"default_memory": 100}, "default_memory: 100 is not within 300..524288 MiB"),
        ({"default_memory": "1024"}, 'default_memory: "1024" is not an integer'),
        ({"agent_timeout": 0}, "agent_timeout: 0 is not within 1..3600 seconds"),
        (
            {"kernel_params": "x" * 2000},
            "kernel_params: with it the kernel's command line has"
            f" {len(kernel_command_line('x' * 2000, enable_debug=False))} characters, more than 2047",
        ),
        (
            {"kernel_params": "x" * 2048},
            f'kernel_params: "{"x" * 64}…" is not printable ASCII of at most 2047 characters',
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:40] if isinstance(value, dict) else "",
)
def test_wrong_configuration(
    configured: Callable[..., Runtime], fields: dict[str, str | int], message: str
) -> None:
    assert refused(configured(**fields)).startswith(f"FILE:3: [hypervisor.qemu] {message}")


def test_configuration_that_is_none(configured: Callable[..., Runtime]) -> None:
    runtime = configured()
    runtime.config.write_text('[hypervisor.qemu]\npath = "/a\n')
    assert refused(runtime).startswith("FILE:2: is not TOML: ")
    runtime.config.unlink()
    assert refused(runtime) == "FILE: no such file; name the configuration with --config"


def test_vsock_of_a_host_without_it(configured: Callable[..., Runtime]) -> None:
    """Where the host has no vhost-vsock that is said; where it has, the sandbox runs by it."""
    runtime = configured(use_vsock=True)
    if os.path.exists("/dev/vhost-vsock"):
        with booted(runtime) as guest:
            assert guest.run("cat", "/proc/cmdline").stdout.endswith("agent.channel=vsock\n")
        return
    assert refused(runtime) == (
        "FILE:3: [hypervisor.qemu] use_vsock: true; /dev/vhost-vsock does not exist:"
        " load the module vhost_vsock, or set it to false"
    )


# QEMU and the guest do not come up


def test_qemu_that_refuses_to_start(configured: Callable[..., Runtime]) -> None:
    """Its own last words are the cause."""
    assert refused(configured(machine_accelerators="nosuch=on")) == (
        "QEMU exited with status 1; QEMU: qemu-system-x86_64: Property 'pc-q35-"
        f"{_machine_version()}-machine.nosuch' not found"
    )


def _machine_version() -> str:
    listed = subprocess.run(["qemu-system-x86_64", "-M", "help"], capture_output=True, text=True, check=True)
    found = re.search(r"\(alias of pc-q35-([\d.]+)\)", listed.stdout)
    assert found
    return found[1]


def test_qemu_that_is_none(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    """A program that ends at once, one that says so, and one that cannot be run at all."""
    fake = tmp_path / "qemu"
    for script, message in (
        ("#!/bin/sh\nexit 3\n", "QEMU exited with status 3"),
        (
            "#!/bin/sh\necho out of luck >&2\nkill -SEGV $$\n",
            "QEMU was ended by signal 11; QEMU: out of luck",
        ),
    ):
        fake.write_text(script)
        fake.chmod(0o755)
        assert refused(configured(path=str(fake))) == message
    fake.write_text("#!/no/interpreter\n")
    words = f"setpriv: failed to execute {fake}: No such file or directory"
    assert refused(configured(path=str(fake))) == f"QEMU exited with status 127; QEMU: {words}"


def test_kernel_that_is_none(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(1 << 20))
    assert refused(configured(kernel=str(kernel))).startswith("QEMU exited with status 1; QEMU: qemu: ")


def test_initrd_that_is_none(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    """Cut short, or filled with noise: the kernel's panic is the cause, and nobody waits for a timeout."""
    initrd = tmp_path / "initrd"
    noise = bytes(range(256)) * 4096
    with INITRD.open("rb") as file:
        for content in (file.read(1 << 20), noise):
            initrd.write_bytes(content)
            started = time.monotonic()
            assert refused(configured(initrd=str(initrd))).startswith(PANIC)
            assert taken(started) < PATIENCE / 2


def test_guest_that_panics_while_it_boots(configured: Callable[..., Runtime]) -> None:
    message = refused(configured(kernel_params="rdinit=/no/init"))
    assert message.startswith(f"{PANIC}VFS: Unable to mount root fs")


def test_init_that_dies(configured: Callable[..., Runtime]) -> None:
    message = refused(configured(kernel_params="rdinit=/usr/bin/false"))
    assert message.startswith(f"{PANIC}Attempted to kill init! exitcode=0x00000100")


def test_agent_that_never_answers(configured: Callable[..., Runtime]) -> None:
    """The wait is bounded by agent_timeout, and what the console last said is told."""
    runtime = configured(kernel_params="rdinit=/usr/bin/sleep -- 1000", agent_timeout=2)
    started = time.monotonic()
    assert refused(runtime) == "the guest's agent does not answer within 2 s (agent_timeout)"
    assert 2 <= taken(started) < PATIENCE / 2


def test_qemu_killed_while_the_guest_boots(configured: Callable[..., Runtime]) -> None:
    runtime = configured()
    run = Started(runtime, "run", "fail")
    run.until("booting the guest")
    record = Guest(runtime, "fail").record()
    os.kill(record["pid"], signal.SIGKILL)
    assert run.end() == 1
    assert run.shown.endswith("\rQEMU was ended by signal 9\n".replace("\r", "\x1b[K"))
    assert not (runtime.root / "sandboxes" / "fail").exists()


# A sandbox that runs fails


def test_panic_while_attached(configured: Callable[..., Runtime]) -> None:
    """Who waits for the guest, and who has a command in it, hear of the panic; the sandbox is gone."""
    runtime = configured()
    run = Started(runtime, "run", "fail")
    run.until("\r\x1b[K")
    cause = f"{PANIC}sysrq triggered crash\n"
    crashed = runtime("exec", "fail", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert crashed == Result(1, "", cause)
    assert run.end() == 1
    assert run.shown.endswith(f"fail has stopped: {cause}")
    assert not (runtime.root / "sandboxes" / "fail").exists()


def test_qemu_killed_while_requests_wait(configured: Callable[..., Runtime]) -> None:
    """All of them get the same cause at once, and so does who comes later; delete needs no force then."""
    runtime = configured()
    with booted(runtime) as guest:
        pid = runtime("state", "fail").json["pid"]
        waiting = [runtime.start("exec", "fail", "--", "sh", "-c", "echo up; sleep 1000") for _ in range(3)]
        for process in waiting:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        # A guest that stands still lets the NIC wait, too.
        os.kill(pid, signal.SIGSTOP)
        with runtime.start("kata-network", "add-iface", "fail", "-", stdin=_json(NIC)) as adding:
            _until_claimed(runtime, adding)
            kill(pid)
            for process in [*waiting, adding]:
                out, err = process.communicate(timeout=PATIENCE)
                assert (process.returncode, err) == (1, b"QEMU was ended by signal 9\n")
                assert out == (b"null\n" if process is adding else b"")
        assert guest.run("true") == Result(1, "", "sandbox fail is stopped: QEMU was ended by signal 9\n")
        assert guest.network("list-ifaces").stdout == "null\n"
        assert runtime("state", "fail").json["cause"] == "QEMU was ended by signal 9"
        assert runtime("delete", "fail") == Result(0, "", "")


def _json(value: object) -> int:
    """Return a descriptor to read the value from."""
    read, write = os.pipe()
    os.write(write, json.dumps(value).encode())
    os.close(write)
    return read


def _until_claimed(runtime: Runtime, process: subprocess.Popen[bytes]) -> None:
    """Return when the NIC's device is reserved: the operation has begun."""
    while not (runtime.root / "devices" / str(NIC["device"])).is_symlink():
        assert process.poll() is None
        os.sched_yield()


def test_qemu_that_stands_still(configured: Callable[..., Runtime]) -> None:
    """Nobody waits for ever: the operation gives up in words, and works when QEMU goes on."""
    runtime = configured(hotplug_timeout=8)
    with booted(runtime) as guest:
        pid = runtime("state", "fail").json["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            answer = guest.network("add-iface", NIC)
            assert taken(started) < PATIENCE
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (answer.status, answer.stdout) == (1, "null\n")
        assert re.fullmatch(r"QEMU, [a-z_]+: no answer within \d+ s\n", answer.stderr), answer.stderr
        added = guest.network("add-iface", NIC)
        assert (added.status, added.stderr) == (0, "")
        assert guest.links() == ["eth-fail", "lo"]
        # Nor does delete wait for it.
        os.kill(pid, signal.SIGSTOP)
        with watched(pid) as ended:
            started = time.monotonic()
            assert runtime("delete", "--force", "fail") == Result(0, "", "")
            assert ended()
            assert taken(started) < PATIENCE / 2


# The disk is full


@contextmanager
def small_root(path: Path, pages: int) -> Iterator[Path]:
    """A root of state on a disk of its own, of so many pages."""
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k,mode=700", "small", path], check=True)
    try:
        yield path
    finally:
        settle(path)
        subprocess.run(["umount", path], check=True)


@contextmanager
def filled(root: Path) -> Iterator[None]:
    """Take all room that is left."""
    with ExitStack() as stack:
        file = stack.enter_context(open(root / "filler", "wb", buffering=0))
        stack.callback((root / "filler").unlink)
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield


def test_no_room_for_a_start(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    """Wherever in its beginning the room ends, that is said and everything goes."""
    config = configured().config
    config.write_text(config.read_text() + "# " + "x" * 9000 + "\n")
    for pages in range(1, 5):
        with small_root(tmp_path / f"root{pages}", pages) as root:
            message = refused(Runtime(root, config))
            assert re.fullmatch(rf"{root}/sandboxes/fail(/\S+)?: .*No space left on device", message), message
            assert not list((root / "sandboxes").iterdir())


def test_no_room_for_the_record(configured: Callable[..., Runtime], tmp_path: Path) -> None:
    """What cannot be recorded is not done; with room again, it is."""
    with small_root(tmp_path / "root", 64) as root:
        runtime = Runtime(root, configured().config)
        with booted(runtime) as guest:
            record = guest.record()
            with filled(root):
                answer = guest.network("add-iface", NIC)
                assert (answer.status, answer.stdout) == (1, "null\n")
                assert re.fullmatch(rf"{root}\S+: cannot be \w+: No space left on device\n", answer.stderr)
                assert guest.links() == ["lo"]
                assert guest.network("list-ifaces") == Result(0, "null\n", "")
                assert "tap-fail" not in os.listdir("/sys/class/net")
            assert guest.record() == record
            assert os.listdir(root / "devices") == []
            assert guest.network("add-iface", NIC).status == 0
            with filled(root):
                kept = guest.network("del-iface", NIC)
            assert guest.network("del-iface", NIC) == Result(0, "null\n", kept.stderr and "")
            assert guest.links() == ["lo"]
        assert os.listdir(root / "sandboxes") == []
