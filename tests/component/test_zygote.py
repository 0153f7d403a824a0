"""The zygote: what it forks, for whom it does not, and that who dies or gives up never leaves two or none."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from kata_shim import __version__, registry
from kata_shim.factory.zygote import MAX_REQUEST
from kata_shim.shims import connect
from tests.cgroups import cgroups
from tests.started import PATIENCE, kill, shims
from tests.zygote import SERVE, Zygote, command, dial, ended, parent, request, zygote

pytestmark = pytest.mark.quick

CALLER = Path(__file__).with_name("zygote_caller.py")
PROJECT = Path(__file__).parents[2]
PATIENT = {**os.environ, "PYTHONPATH": str(PROJECT), "PATIENCE": str(PATIENCE)}
CALLERS = 20
# What a process has of its own, or by being another's child, or by what it has done so far.
OWN = re.compile(r"(Pid|Tgid|Ngid|PPid|NS.*|Vm.*|Rss.*|.*ctxt_switches|HugetlbPages|FDSize|SigQ):")
GLIBCS_SIGNALS = 3 << 31  # 32 and 33
COMPARED = ("cmdline", "comm", "environ", "limits", "cgroup", "oom_score_adj", "coredump_filter")
LINKS = ("exe", "cwd", "root")


@pytest.fixture
def one(root: Path) -> Iterator[Zygote]:
    """A zygote; the sandboxes that a test leaves are deleted."""
    with zygote(root) as one:
        yield one
        os.kill(one.pid, signal.SIGCONT)
        for sandbox_id in registry.list_ids(str(root)):
            call(root, sandbox_id, "sandbox.delete", b'{"force":true}')


def call(root: Path, sandbox_id: str, method: str = "shim.ping", params: bytes = b"") -> None:
    """Call a shim; only "sandbox.delete" starts one."""
    connection = connect(str(root), sandbox_id, revive=method == "sandbox.delete")
    try:
        assert connection.call(method, params) == b"null"
    finally:
        connection.close()


class Caller:
    """A process that has shims started."""

    def __init__(self, root: Path, *ids: str, before: tuple[str, ...] = (), **options: object) -> None:
        for sandbox_id in ids:
            registry.claim(str(root), sandbox_id)
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            [*before, sys.executable, str(CALLER), str(root), *ids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **{"env": PATIENT, **options},
        )

    def begin(self) -> None:
        """Let it have the next one started."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def done(self) -> None:
        """Wait until that one answers."""
        assert self.process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=PATIENCE)


def started(root: Path, sandbox_id: str, **options: object) -> int:
    """Have a shim started by a caller of its own, and return its pid."""
    with Caller(root, sandbox_id, **options) as caller:  # type: ignore[arg-type]
        caller.begin()
        caller.done()
    (pid,) = shims(root, sandbox_id)
    return pid


# Likeness


def look(pid: int, sandbox_id: str) -> dict[str, object]:
    """Return all that /proc shows of a shim, whose id is replaced, without what it has of its own."""
    directory = Path(f"/proc/{pid}")
    shown: dict[str, object] = {}
    for name in COMPARED:
        shown[name] = (directory / name).read_bytes().replace(sandbox_id.encode(), b"ID")
    for line in (directory / "status").read_text().splitlines():
        if line.startswith("SigIgn"):  # glibc's posix_spawn has two signals of glibc's own ignored, until it
            line = f"SigIgn: {int(line.split()[1], 16) & ~GLIBCS_SIGNALS:x}"  # needs them
        if not OWN.match(line):
            shown[f"status {line.partition(':')[0]}"] = line
    stat = ["", "", "", *(directory / "stat").read_text().rpartition(")")[2].split()]
    shown["is leader of group and session"] = stat[5:7] == [str(pid)] * 2
    shown |= {"tty": stat[7], "priority, nice, threads": stat[18:21], "signal at exit": stat[38]}
    shown["scheduling"] = (os.sched_getscheduler(pid), stat[40:42], os.sched_getaffinity(pid))
    for name in (*LINKS, *(f"ns/{name}" for name in os.listdir(directory / "ns"))):
        shown[name] = os.readlink(directory / name)
    shown["fds"] = {
        int(fd): re.sub(r"\d+", "", os.readlink(directory / "fd" / fd)).replace(sandbox_id, "ID")
        + re.sub(r"(?s).*(flags:\s*\d+).*", r"\1", (directory / "fdinfo" / fd).read_text())
        for fd in os.listdir(directory / "fd")
    }
    return shown


def be_unusual(groups: list[Path]) -> Callable[[], None]:
    """Return what makes a new process different from its zygote in all that a child inherits."""

    def change() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text("0")
        os.nice(5)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.chdir("/tmp")
        os.umask(0o002)
        Path("/proc/self/oom_score_adj").write_text("321")
        Path("/proc/self/coredump_filter").write_text("0x1")
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 1000))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (2**22, 2**24))
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})

    return change


@pytest.mark.parametrize("before", [(), ("unshare", "--net")], ids=["same-netns", "other-netns"])
def test_forked_and_execed_are_alike(root: Path, tmp_path: Path, before: tuple[str, ...]) -> None:
    odd = {**PATIENT, "PATH": "/usr/bin:/bin", "EMPTY": "", "TZ": "UTC", "ODD": "a=b\udcff"}
    with cgroups(tmp_path) as groups, zygote(root) as one:
        with Caller(
            root, "forked", "execed", before=before, env=odd, preexec_fn=be_unusual(groups)
        ) as caller:
            caller.begin()
            caller.done()
            one.path.rename(f"{one.path}.away")
            caller.begin()
            caller.done()
        one.path.with_name("zygote.sock.away").rename(one.path)
        (forked,), (execed,) = shims(root, "forked"), shims(root, "execed")
        assert (parent(forked) == one.pid, parent(execed) == one.pid) == (True, False)
        shown = look(forked, "forked")
        assert shown == look(execed, "execed")
        assert shown["oom_score_adj"] == b"321\n"
        assert all(group.name.encode() in bytes(str(shown["cgroup"]), "ascii") for group in groups)
        assert (shown["ns/net"] != os.readlink("/proc/self/ns/net")) is bool(before)
        for pid in (forked, execed):
            kill(pid)
    for sandbox_id in ("forked", "execed"):
        registry.remove(str(root), sandbox_id)


def test_a_caller_with_signals_of_glibc_ignored(one: Zygote, root: Path) -> None:
    """As whoever was started by posix_spawn has them: nobody can ignore them by himself."""
    code = "import os, sys; os.waitpid(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)"
    shim = started(root, "a", before=(sys.executable, "-c", code))
    assert parent(shim) == one.pid
    assert one.said() == ""


def test_twenty_at_once(one: Zygote, root: Path) -> None:
    ids = [f"s{number}" for number in range(CALLERS)]
    with ExitStack() as stack:
        callers = [stack.enter_context(Caller(root, sandbox_id)) for sandbox_id in ids]
        for caller in callers:
            caller.begin()
        for caller in callers:
            caller.done()
    assert {pid for sandbox_id in ids for pid in shims(root, sandbox_id)} == one.children()
    assert len(one.children()) == CALLERS
    assert one.said() == ""


RANDOM = """
import random, socket, sys, uuid
from kata_shim.factory import zygote
def run(arguments):
    print(arguments[-1], random.random(), uuid.uuid4(), random.random(), flush=True)
    return 0
random.seed(1)
zygote.serve(socket.socket(fileno=int(sys.argv[1])), run)
"""


def test_random_numbers_differ(root: Path) -> None:
    """They begin anew in each child, wherever the zygote was."""
    numbers: list[str] = []
    with zygote(root, RANDOM) as one:
        for sandbox_id in ("a", "b"):
            registry.claim(str(root), sandbox_id)
            with one.dial() as connection, listening(root, sandbox_id) as (listener, log):
                connection.sendall(request(root, sandbox_id))
                child = one.child(connection)
                socket.send_fds(connection, [b"+"], [log, listener.fileno()])
                assert ended({child})
            words = (root / "sandboxes" / sandbox_id / "shim.log").read_text().split()
            assert words[0] == sandbox_id
            numbers += words[1:]
            registry.remove(str(root), sandbox_id)
    assert len(set(numbers)) == 6


# Refusals


REFUSED = {
    "version": {"version": "0.0.0"},
    "encoding": {"encoding": "latin-1"},
    "another interpreter": {"program": ("/usr/bin/true", *SERVE)},
    "another module": {"program": (sys.executable, "-I", "-m", "kata_shim.elsewhere", "serve", "--root")},
    "another command": {"program": (sys.executable, "-I", "-m", "kata_shim.shim", "check", "--root")},
    "no variable": {"environment": ("PATH",)},
    "no key": {"environment": ("=x",)},
}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
def test_request_that_is_refused(one: Zygote, root: Path, fields: dict[str, object]) -> None:
    refused(one, request(root, "a", **fields))  # type: ignore[arg-type]
    still_serves(one, root)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 4,
        b"\0\0\0\1\0",
        b"\0\0\0\4a\0b\0",
        (MAX_REQUEST + 1).to_bytes(4, "big"),
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(65536),
    ],
    ids=range(7),
)
def test_garbage(one: Zygote, root: Path, garbage: bytes) -> None:
    refused(one, garbage)
    still_serves(one, root)


def refused(one: Zygote, sent: bytes) -> None:
    with one.dial() as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        with suppress(ConnectionResetError):  # the rest of what we sent was not read
            assert connection.recv(1) == b"-"
    assert "no shim is forked" in one.said()


def still_serves(one: Zygote, root: Path) -> None:
    assert parent(started(root, "next")) == one.pid, one.said()


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\1\0abc"], ids=len)
def test_silent_caller_holds_up_nobody(one: Zygote, root: Path, sent: bytes) -> None:
    with one.dial() as connection:
        connection.sendall(sent)
        still_serves(one, root)
        # And is given up in the end.
        assert connection.recv(1) == b"-"


UNLIKE = {
    "NoNewPrivs": ("setpriv", "--no-new-privs"),
    "CapPrm": ("setpriv", "--bounding-set=-net_raw"),
    "Groups": ("setpriv", "--groups=1"),
    "Gid": ("setpriv", "--regid=1", "--keep-groups"),
    "ns/mnt": ("unshare", "--mount"),
    "ns/uts": ("unshare", "--uts"),
    "ns/ipc": ("unshare", "--ipc"),
    "ns/cgroup": ("unshare", "--cgroup"),
    "ns/pid_for_children": ("unshare", "--pid"),
    "ns/time": ("unshare", "--time"),
    "personality": ("setarch", "--addr-no-randomize"),
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_caller_that_it_cannot_be_like(one: Zygote, root: Path, difference: str) -> None:
    """The shim is exec'ed, and has what its caller has."""
    pid = started(root, "a", before=UNLIKE[difference])
    assert parent(pid) != one.pid
    assert difference in one.said()
    still_serves(one, root)


def test_caller_with_another_root_directory(one: Zygote, root: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "--rbind", "/", tmp_path], check=True)
    try:
        pid = started(root, "a", before=("chroot", str(tmp_path)))
        assert parent(pid) != one.pid
        assert f"root: {tmp_path}" in one.said()
        call(root, "a", "sandbox.delete", b'{"force":true}')
        assert ended({pid})
    finally:
        subprocess.run(["umount", "--recursive", tmp_path], check=True)


@pytest.mark.parametrize("version", [__version__, "0.0.0"])
def test_another_installation(one: Zygote, root: Path, version: str) -> None:
    """One that was changed under a running zygote is not what it has imported: it makes room for another."""
    still_serves(one, root)
    file = PROJECT / "kata_shim/quoting.py"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        refused(one, request(root, "a", version=version))
        assert "has changed since it was imported" in one.said()
        assert ended({one.pid})
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# Deaths


def test_zygote_killed_with_a_request_before_it(one: Zygote, root: Path) -> None:
    os.kill(one.pid, signal.SIGSTOP)
    with Caller(root, "a") as caller:
        caller.begin()
        wait_until_asked(one)
        one.kill()
        caller.done()
    (pid,) = shims(root, "a")
    assert parent(pid) != one.pid


def wait_until_asked(one: Zygote) -> None:
    """Return once a connection waits to be accepted: its end of the socket has the path, and no process."""
    line = f" {one.path}"
    while Path("/proc/net/unix").read_text().count(f"{line}\n") < 2:
        os.sched_yield()


def test_zygote_killed_when_it_has_forked(one: Zygote, root: Path) -> None:
    """The child is on its own: what it was promised to get it gets, and serves."""
    registry.claim(str(root), "a")
    with one.dial() as connection, listening(root, "a") as (listener, log):
        connection.sendall(request(root, "a"))
        child = one.child(connection)
        one.kill()
        socket.send_fds(connection, [b"+"], [log, listener.fileno()])
        call(root, "a")
    assert shims(root, "a") == [child]


@contextmanager
def listening(root: Path, sandbox_id: str) -> Iterator[tuple[socket.socket, int]]:
    directory = root / "sandboxes" / sandbox_id
    log = os.open(directory / "shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "shim.sock"))
        listener.listen()
        yield listener, log
    os.close(log)


def test_caller_that_gives_up(one: Zygote, root: Path) -> None:
    with one.dial() as connection:
        connection.sendall(request(root, "a"))
        child = one.child(connection)
    assert ended({child})
    with one.dial() as connection:
        connection.sendall(request(root, "a"))
        child = one.child(connection)
        connection.sendall(b"+")  # without the descriptors
        assert ended({child})
    assert one.said() == ""


def test_stopped_zygote(one: Zygote, root: Path) -> None:
    """Its callers give up, and get no second shim when it goes on."""
    os.kill(one.pid, signal.SIGSTOP)
    pid = started(root, "a", env={**PATIENT, "PATIENCE": "0.1"})
    assert parent(pid) != one.pid
    os.kill(one.pid, signal.SIGCONT)
    still_serves(one, root)
    (after,) = shims(root, "next")
    assert ended(one.children() - {after})
    assert shims(root, "a") == [pid]


def test_shim_outlives_the_zygote(one: Zygote, root: Path) -> None:
    pid = started(root, "a")
    one.kill()
    call(root, "a")
    assert shims(root, "a") == [pid]


STARTER = """
import os, socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
words = [word.replace("FD", str(listener.fileno())) for word in sys.argv[2:]]
print(subprocess.Popen(words, pass_fds=[listener.fileno()]).pid, flush=True)
sys.stdin.read()
"""


def test_zygote_ends_with_its_starter(root: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", STARTER, str(tmp_path / "socket"), *command(root, 0)[:-1], "FD"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        with dial(tmp_path / "socket") as connection:
            connection.sendall(request(root, "a"))
            assert connection.recv(1) == b"+"  # it has got as far as to serve
        starter.kill()
        assert ended({pid})


def test_zygote_of_anothers_socket(root: Path, tmp_path: Path) -> None:
    """Its starter has died before it could ask to die with it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listen = "import socket,sys; socket.socket(fileno=int(sys.argv[1])).listen()"
        number = listener.fileno()
        subprocess.run([sys.executable, "-c", listen, str(number)], pass_fds=[number], check=True)
        done = subprocess.run(command(root, number), pass_fds=[number], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"is not our parent" in done.stderr
