"""Templates: made once, cloned by every start that can use them, never trusted further than they go."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.started import PATIENCE, Started, kill, shims, watched
from tests.support import Guest, Result, Runtime, World, left_behind, leftovers
from tests.system.network import agree, nic

CLONES = 20
CLOCK = 0.05  # seconds that a clone's clock may be off
EMULATED = "as configured: QEMU emulates (TCG), which is slow\n"
UNCLONED = "no clone of the template, so the guest is booted: "
INITRD = Path("/var/lib/kata-shim/guest/initrd")

# What must not be the same in two guests: fresh randomness in all its forms, and the first sequence number
# that TCP gives to the same two addresses and ports (RFC 6528).
SECRETS = """
import ctypes, json, os, random, socket, time, uuid
at_random = ctypes.CDLL(None).getauxval
at_random.restype, at_random.argtypes = ctypes.c_void_p, [ctypes.c_ulong]
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
sniffer.bind(("lo", 0))
caller = socket.socket()
caller.bind(("127.0.0.1", 5000))
caller.connect_ex(("127.0.0.1", 5001))
kernel = "/proc/sys/kernel/"
print(json.dumps({
    "urandom": os.urandom(16).hex(),
    "getrandom": os.getrandom(16).hex(),
    "random": random.getrandbits(128),
    "uuid": str(uuid.uuid4()),
    "kernel's uuid": open(kernel + "random/uuid").read(),
    "boot id": open(kernel + "random/boot_id").read(),
    "canary": ctypes.string_at(at_random(25), 16).hex(),
    "stack": hex(id(object())),
    "sequence number": sniffer.recv(100)[24:28].hex(),
    "machine id": open("/etc/machine-id").read(),
    "host name": open(kernel + "hostname").read().strip(),
    "time": time.time(),
}))
"""

FILL = ("dd", "if=/dev/urandom", "of=/tmp/own", "bs=1M", "count=64")


@dataclass(frozen=True)
class Factory:
    """A directory of templates, and the CLI with a configuration that uses it."""

    runtime: Runtime
    path: Path

    def __call__(self, *words: str) -> Result:
        return self.runtime(*words)

    def templates(self) -> list[Path]:
        """The templates there are."""
        return sorted(path.parent for path in self.path.glob("*/template.json"))

    def run(self, sandbox_id: str) -> str:
        """Start a sandbox; return how that went."""
        started = self("run", "--detach", sandbox_id)
        assert started == Result(0, "", EMULATED), started
        return str(self("state", sandbox_id).json["source"])

    def delete(self, *ids: str) -> None:
        """Delete sandboxes."""
        for sandbox_id in ids:
            assert self("delete", "--force", sandbox_id) == Result(0, "", "")


def configure(path: Path, templates: Path, wait: bool = True, /, **fields: object) -> Path:
    """Write a configuration for a small machine that is cloned from what is in `templates`."""
    values = {"accelerator": "tcg", "default_memory": 300, "default_root_ports": 2, **fields}
    lines = ["[hypervisor.qemu]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    lines += ["[factory]", "enable_template = true", f'template_path = "{templates}"']
    path.write_text("\n".join([*lines, f"template_wait = {json.dumps(wait)}", ""]))
    return path


@pytest.fixture(scope="module")
def factory(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Templates that these tests share."""
    path = root / "shared templates"
    directory = tmp_path_factory.mktemp("factory")
    return Factory(Runtime(root, configure(directory / "c.toml", path, shared_memory=False)), path)


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Iterator[Factory]:
    """Templates of a test's own: at first there is none."""
    path = root / "own templates"
    made = Factory(Runtime(root, configure(tmp_path / "c.toml", path, shared_memory=False)), path)
    yield made
    made.delete(*os.listdir(root / "sandboxes"))
    shutil.rmtree(path, ignore_errors=True)


def digest(file: Path) -> str:
    """What a file holds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def test_made_once_and_only_for_us(own: Factory) -> None:
    assert own.run("a") == "template"
    (template,) = own.templates()
    before = digest(template / "memory")
    made = (template / "state").stat()
    assert own.run("b") == "template"
    assert own.templates() == [template]
    assert (template / "state").stat() == made
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (own.path, template)}
    assert set(modes.values()) == {0o700}
    assert {path.name for path in template.iterdir()} == {"memory", "state", "template.json"}
    for name in ("memory", "state"):
        assert stat.S_IMODE((template / name).stat().st_mode) == 0o600
    # What a guest writes is its own: 64 MiB in one are neither the template's nor another's.
    assert (
        Guest(own.runtime, "a").run("dd", "if=/dev/urandom", "of=/tmp/own", "bs=1M", "count=64").status == 0
    )
    assert Guest(own.runtime, "b").run("test", "-e", "/tmp/own").status == 1
    assert digest(template / "memory") == before
    own.delete("a", "b")


def test_every_clone_is_its_own_machine(factory: Factory) -> None:
    seen: list[dict[str, object]] = []
    for number in range(CLONES):
        name = f"clone-{number}"
        assert factory.run(name) == "template"
        before = time.time()
        told = Guest(factory.runtime, name).run("python3", "-I", "-c", SECRETS)
        assert (told.status, told.stderr) == (0, "")
        found = told.json
        assert before - CLOCK <= found.pop("time") <= time.time() + CLOCK
        assert found.pop("host name") == name
        seen.append(found)
        factory.delete(name)
    for what in seen[0]:
        values = [found[what] for found in seen]
        assert len(set(map(str, values))) == CLONES, f"{what}: {values}"


def test_network_cards_are_plugged_after_cloning(factory: Factory) -> None:
    for number, name in enumerate("ab"):
        assert factory.run(name) == "template"
        guest = Guest(factory.runtime, name)
        assert guest.links() == ["lo"]
        assert guest.network("add-iface", nic(number)).status == 0
    for number, name in enumerate("ab"):
        guest = Guest(factory.runtime, name)
        (link,) = (one for one in guest.run("ip", "-j", "link").json if one["ifname"] != "lo")
        assert link["address"] == nic(number)["hwAddr"]
        agree(guest)
        assert guest.network("del-iface", {"name": f"eth{number}"}).status == 0
    factory.delete("a", "b")


def test_a_clone_is_taken_over(factory: Factory) -> None:
    assert factory.run("a") == "template"
    before = factory("state", "a").json
    kill(before["shimPid"])
    after = factory("state", "a").json
    assert {**after, "shimPid": 0} == {**before, "shimPid": 0}
    assert Guest(factory.runtime, "a").run("hostname") == Result(0, "a\n", "")
    factory.delete("a")


def test_an_emulated_clone_gets_no_huge_pages(factory: Factory) -> None:
    """QEMU asks for them, for the code that it makes."""
    assert factory.run("a") == "template"
    status = Path(f"/proc/{factory('state', 'a').json['pid']}/status").read_text()
    factory.delete("a")
    assert "THP_enabled:\t0\n" in status


def test_shared_memory_is_a_copy(root: Path, own: Factory, tmp_path: Path) -> None:
    """Of the same template: how a clone maps its memory is the clone's own affair."""
    assert own.run("private") == "template"
    (template,) = own.templates()
    before = digest(template / "memory")
    shared = Factory(Runtime(root, configure(tmp_path / "s.toml", own.path, shared_memory=True)), own.path)
    assert shared.run("shared") == "template"
    assert shared.templates() == [template]
    pid = shared("state", "shared").json["pid"]
    assert "rw-s" in next(
        line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd" in line
    )
    assert str(template) not in Path(f"/proc/{pid}/maps").read_text()
    assert Guest(shared.runtime, "shared").run(*FILL).status == 0
    assert digest(template / "memory") == before
    assert "faster than a boot" in (root / "sandboxes/shared/shim.log").read_text()
    own.delete("private", "shared")


def test_shared_memory_is_no_copy_where_a_boot_is_faster(root: Path, own: Factory, tmp_path: Path) -> None:
    assert own.run("private") == "template"
    (template,) = own.templates()
    information = template / "template.json"
    told = json.loads(information.read_text())
    information.write_text(json.dumps({**told, "seconds": 0.001}))
    shared = Runtime(root, configure(tmp_path / "s.toml", own.path, shared_memory=True))
    started = shared("run", "--detach", "shared")
    assert (started.status, started.stderr.count("\n")) == (0, 2)
    assert "so the guest is booted: the template's memory is to be shared, and a copy" in started.stderr
    assert shared("state", "shared").json["source"] == "boot"
    assert own.run("another") == "template"
    own.delete("private", "shared", "another")


def test_another_machine_has_another_template(root: Path, own: Factory, tmp_path: Path) -> None:
    """Four are kept: of a fifth's making the one goes that was used least lately."""
    factories = [own]
    for name, value in (
        ("kernel_params", "quiet"),
        ("default_memory", 301),
        ("cpu_model", "qemu64"),
        ("machine_type", "pc"),
    ):
        config = configure(tmp_path / f"{name}.toml", own.path, **{name: value})
        factories.append(Factory(Runtime(root, config), own.path))
    first: list[Path] = []
    for number, one in enumerate(factories):
        assert one.run("a") == "template"
        one.delete("a")
        assert len(own.templates()) == min(number + 1, 4)
        if number == 1:
            first = own.templates()
            assert own.run("a") == "template"  # which makes it the latest
            own.delete("a")
    assert len([path for path in first if path.exists()]) == 1


def test_stale_template_is_made_again(root: Path, own: Factory, tmp_path: Path) -> None:
    """What makes one stale is tested with the identity of templates, without a guest."""
    initrd = tmp_path / "initrd"
    shutil.copy(INITRD, initrd)
    config = configure(tmp_path / "c.toml", own.path, initrd=str(initrd), shared_memory=False)
    changing = Factory(Runtime(root, config), own.path)
    assert changing.run("a") == "template"
    (template,) = changing.templates()
    os.utime(initrd)
    assert changing.run("b") == "template"
    (other,) = changing.templates()
    assert other != template
    # The clone of what has gone goes on.
    assert Guest(changing.runtime, "a").run("hostname") == Result(0, "a\n", "")
    changing.delete("a", "b")


@pytest.mark.parametrize("broken", ["state", "memory"])
def test_useless_template_is_made_again(own: Factory, broken: str) -> None:
    assert own.run("a") == "template"
    own.delete("a")
    (template,) = own.templates()
    os.truncate(template / broken, 4096)
    started = own("run", "--detach", "a")
    assert started.status == 0
    assert started.stderr.startswith(UNCLONED)
    assert started.stderr.endswith("\n" + EMULATED)
    assert own("state", "a").json["source"] == "boot"
    assert Guest(own.runtime, "a").run("hostname") == Result(0, "a\n", "")
    assert own.templates() == []
    own.delete("a")
    assert own.run("a") == "template"
    own.delete("a")


@pytest.mark.parametrize("how", ["open to others", "another's", "a link", "a file"])
def test_templates_of_others_are_not_used(own: Factory, tmp_path: Path, how: str) -> None:
    """Who can write there could put any guest in the place of ours."""
    if how == "a link":
        (tmp_path / "real").mkdir(mode=0o700)
        own.path.symlink_to(tmp_path / "real")
    elif how == "a file":
        own.path.touch()
    else:
        own.path.mkdir(mode=0o700)
        if how == "another's":
            os.chown(own.path, 65534, 65534)
        else:
            own.path.chmod(0o750)
    started = own("run", "--detach", "a")
    if how in ("a link", "a file"):
        own.path.unlink()
    rule = "must be a directory of this user's own, mode 0700; correct it, or set another"
    assert started == Result(0, "", f"{UNCLONED}template_path: {own.path} {rule}\n{EMULATED}")
    own.delete("a")


def test_many_at_once_make_one(own: Factory) -> None:
    names = ("a", "b", "c", "d")
    calls = [own.runtime.start("run", "--detach", name) for name in names]
    for call in calls:
        assert call.communicate(timeout=PATIENCE * 2) == (b"", EMULATED.encode())
        assert call.returncode == 0
    assert [own("state", name).json["source"] for name in names] == ["template"] * 4
    assert len(own.templates()) == 1
    own.delete(*names)


def test_others_boot_where_they_need_not_wait(root: Path, own: Factory, tmp_path: Path) -> None:
    hasty = Factory(Runtime(root, configure(tmp_path / "h.toml", own.path, False)), own.path)
    with making(own, "a") as maker:
        assert hasty("run", "--detach", "b") == Result(0, "", EMULATED)
        assert hasty("state", "b").json["source"] == "boot"
        assert maker.end() == 0
    assert own("state", "a").json["source"] == "template"
    own.delete("a", "b")


@contextmanager
def making(own: Factory, sandbox_id: str) -> Iterator[Started]:
    """Start a sandbox, up to where it makes its template and QEMU runs."""
    started = Started(own.runtime, "run", "--detach", sandbox_id)
    started.until("booting the template")
    yield started


def makers(own: Factory) -> list[int]:
    """The QEMUs that make a template: their output goes to where it is made."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/fd/1").startswith(f"{own.path}/.new-"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def test_maker_killed(root: Path, own: Factory) -> None:
    before = leftovers(root)
    with making(own, "a") as started:
        (qemu,) = makers(own)
        (shim,) = shims(root, "a")
        with watched(qemu) as ended:
            kill(shim)
            assert ended(PATIENCE), "the template's QEMU outlives its maker"
        assert started.end() == 1
    assert left_behind(root, before) == World()
    assert [path.name[:5] for path in own.path.iterdir() if path.is_dir()] == [".new-"]
    assert own.run("a") == "template"
    assert [path for path in own.path.iterdir() if path.is_dir()] == own.templates()
    own.delete("a")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_making_is_given_up(root: Path, own: Factory, number: signal.Signals) -> None:
    before = leftovers(root)
    with making(own, "a") as started:
        started.signal(number)
        assert started.end() == 130
    assert left_behind(root, before) == World()
    assert [path for path in own.path.iterdir() if path.is_dir()] == []
    assert makers(own) == []


def test_no_room_for_a_template(own: Factory) -> None:
    own.path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "small", own.path], check=True)
    try:
        started = own("run", "--detach", "a")
        assert started.status == 0
        assert started.stderr.startswith(UNCLONED)
        assert own.templates() == []
        assert own("state", "a").json["source"] == "boot"
        own.delete("a")
    finally:
        subprocess.run(["umount", own.path], check=True)


def test_a_tmpfs_is_mounted_where_there_is_none(root: Path, tmp_path: Path) -> None:
    path = Path(f"/var/tmp/kata-shim-test.{os.getpid()}")
    own = Factory(Runtime(root, configure(tmp_path / "d.toml", path, shared_memory=False)), path)
    try:
        assert own.run("a") == "template"
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        (options,) = (
            words[3].split(",") for words in mounts if words[1] == str(path) and words[2] == "tmpfs"
        )
        assert {"nosuid", "nodev", "noexec", "mode=700"} <= set(options)
        own.delete("a")
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()
