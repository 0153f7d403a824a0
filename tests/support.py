"""The tests' hands: the CLI as a user runs it, and a look at what a test may leave behind."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BIN = Path(sys.executable).parent
PROJECT = Path(__file__).resolve().parent.parent
ENDING = 30.0  # seconds
TASK_SOCKETS = "/run/containerd/s"  # of shims that containerd, or a test in its place, has started


@dataclass(frozen=True)
class Result:
    """What a command left: exit status, stdout, stderr."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """Stdout as JSON."""
        return json.loads(self.stdout)


class Call(subprocess.Popen[bytes]):
    """A command that is killed when its test fails meanwhile: Popen would wait for its end for ever."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the command's end."""
        if kind is not None:
            self.kill()
        super().__exit__(kind, value, trace)


def environment(root: Path, config: Path) -> dict[str, str]:
    """What the CLI and the shims run with."""
    return {**os.environ, "KATA_SHIM_ROOT": str(root), "KATA_SHIM_CONFIG": str(config)}


@dataclass(frozen=True)
class Runtime:
    """`kata-runtime` on one root of state."""

    root: Path
    config: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the CLI runs with."""
        return environment(self.root, self.config)

    def command(self, *arguments: str) -> list[str]:
        """The command line of a call."""
        return [str(BIN / "kata-runtime"), *arguments]

    def __call__(self, *arguments: str, stdin: str | bytes = b"", timeout: float = 120) -> Result:
        """Run the CLI to its end."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            self.command(*arguments),
            input=data,
            capture_output=True,
            env=self.environment,
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> Call:
        """Start the CLI and return at once."""
        return Call(
            self.command(*arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
        )


@dataclass(frozen=True)
class Guest:
    """One running sandbox, by the CLI."""

    runtime: Runtime
    id: str

    def network(self, command: str, value: object = None) -> Result:
        """Run a kata-network command with `value` as its input; a string goes in as it is."""
        if value is None:
            return self.runtime("kata-network", command, self.id)
        text = value if isinstance(value, str) else json.dumps(value)
        return self.runtime("kata-network", command, self.id, "-", stdin=text)

    def ipvsadm(self, parameters: str, *flags: str) -> Result:
        """Run kata-ipvs ipvsadm with these parameters."""
        return self.runtime("kata-ipvs", "ipvsadm", "--parameters", parameters, *flags, self.id)

    def restore(self, rules: str) -> Result:
        """Run kata-ipvs ipvsadm --restore with these rules as its stdin."""
        return self.runtime("kata-ipvs", "ipvsadm", "--restore", "-", self.id, stdin=rules)

    def cleanup(self, parameters: str) -> Result:
        """Run kata-ipvs cleanup with these parameters."""
        return self.runtime("kata-ipvs", "cleanup", "--parameters", parameters, self.id)

    def run(self, *argv: str, stdin: bytes = b"") -> Result:
        """Run a command in the guest."""
        return self.runtime("exec", self.id, "--", *argv, stdin=stdin)

    def links(self) -> list[str]:
        """The names of the guest's network devices."""
        return sorted(link["ifname"] for link in self.run("ip", "-j", "link").json)

    def record(self) -> dict[str, Any]:
        """What record.json says."""
        text = (self.runtime.root / "sandboxes" / self.id / "record.json").read_text()
        return dict(json.loads(text))


@dataclass(frozen=True)
class World:
    """What a test can leave behind."""

    processes: frozenset[str] = field(default_factory=frozenset)
    links: frozenset[str] = field(default_factory=frozenset)
    namespaces: frozenset[str] = field(default_factory=frozenset)
    mounts: frozenset[str] = field(default_factory=frozenset)
    files: frozenset[str] = field(default_factory=frozenset)

    def beyond(self, before: Self) -> World:
        """What is here and was not there before."""
        new = {each.name: getattr(self, each.name) - getattr(before, each.name) for each in fields(self)}
        return World(**new)


def shipped(root: Path, **fields: str | int | bool) -> Path:
    """Return the shipped configuration.toml with some `fields` changed, its template with the run's state."""
    text = (PROJECT / "configuration.toml").read_text()
    for name, value in {"template_path": f"{root}/template", **fields}.items():
        text, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {json.dumps(value)}", text)
        assert found == 1, name
    path = root / f"{'-'.join(['configuration', *fields])}.toml"
    path.write_text(text)
    return path


def leftovers(root: Path) -> World:
    """Look at everything that belongs to this run."""
    return World(
        processes=frozenset(_processes(root)),
        links=frozenset(os.listdir("/sys/class/net")),
        namespaces=frozenset(_list("/run/netns")),
        mounts=frozenset(line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()),
        files=frozenset(
            f"{directory}/{name}"
            for directory in (f"{root}/sandboxes", f"{root}/devices", TASK_SOCKETS)
            for name in _list(directory)
        ),
    )


def settle(root: Path, but: frozenset[str] = frozenset()) -> None:
    """Give processes that are not in `but` a moment to end: a shim answers the call that ends it first."""
    deadline = time.monotonic() + ENDING
    for process in set(_processes(root)) - but:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(int(process.split()[0]))
            select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            os.close(descriptor)


def left_behind(root: Path, before: World) -> World:
    """Return what is here and was not there before, once it had time to go: a tap outlives its QEMU."""
    settle(root, but=before.processes)
    deadline = time.monotonic() + ENDING
    while (left := leftovers(root).beyond(before)).links and time.monotonic() < deadline:
        select.select([], [], [], 0.05)
    return left


def _list(directory: str) -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir(directory)
    return []


def _processes(root: Path) -> list[str]:
    """Every process that was started with this root, or writes into it, and every zombie child."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            # One that is just ending has no words any more, but still its files while its memory goes.
            output = os.readlink(f"/proc/{pid}/fd/1")
        except OSError:
            continue
        if str(root) in words or output.startswith(str(root)):
            found.append(f"{pid} {words[:60]}")
    return found
