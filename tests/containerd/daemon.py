"""A containerd of the tests' own, and `ctr` on it."""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import BIN, Call, Result, environment

RUNTIME = "io.containerd.kata.v2"
PATIENCE = 180.0  # seconds; the first sandbox of a configuration makes its template
LOOK = 0.1  # seconds until an event is published again that was not heard
OF_THE_HOST = 'msg="DEPRECATION: '  # what a later ctr says of the host, as that its cgroups are version 1
PROBE = " /namespaces/update "  # its topic
CONFIGURATION = """version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [{disabled}]
[grpc]
address = "{directory}/containerd.sock"
[ttrpc]
address = "{directory}/containerd.sock.ttrpc"
[timeouts]
"io.containerd.timeout.shim.cleanup" = "60s"
"io.containerd.timeout.shim.load" = "60s"
"io.containerd.timeout.shim.shutdown" = "60s"
"io.containerd.timeout.task.state" = "60s"
[plugins."io.containerd.runtime.v1.linux"]
no_shim = true
"""
UNUSED = ("aufs", "btrfs", "devmapper", "zfs")


@dataclass
class Containerd:
    """One containerd, and what it runs on."""

    directory: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        log = (self.directory / "log").open("ab")
        self.process = subprocess.Popen(
            ["containerd", "-c", self.directory / "config.toml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=self.environment,
        )
        log.close()
        started = time.monotonic()
        while (answered := self("version")).status:  # each call takes a tenth of a second
            assert self.process.poll() is None, "containerd has ended"
            assert time.monotonic() - started < PATIENCE, answered.stderr

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE)
        self.process = None

    def command(self, *words: str) -> list[str]:
        """The command line of a `ctr`."""
        return ["ctr", "-a", f"{self.directory}/containerd.sock", *words]

    def __call__(self, *words: str, stdin: bytes = b"") -> Result:
        """Run `ctr` to its end."""
        done = subprocess.run(
            self.command(*words), input=stdin, capture_output=True, timeout=PATIENCE, cwd="/"
        )
        lines = [line for line in done.stderr.decode().splitlines(keepends=True) if OF_THE_HOST not in line]
        return Result(done.returncode, done.stdout.decode(errors="replace"), "".join(lines))

    def run(self, rootfs: Path, name: str, *command: str, flags: tuple[str, ...] = ("--rm",)) -> Result:
        """`ctr run` with our runtime."""
        return self("run", *flags, "--runtime", RUNTIME, "--rootfs", str(rootfs), name, *command)

    def tasks(self) -> dict[str, tuple[int, str]]:
        """Each task's pid and status."""
        lines = [line.split() for line in self("tasks", "list").stdout.splitlines()[1:]]
        return {name: (int(pid), status) for name, pid, status in lines}

    def remove(self, name: str) -> None:
        """Remove a container and its task, whatever they are doing."""
        self("tasks", "delete", "--force", name)
        self("containers", "delete", name)


@contextmanager
def containerd(directory: Path, root: Path, config: Path, cri: str = "") -> Iterator[Containerd]:
    """Run a containerd whose shims have `root` and `config`, its CRI plugin configured by `cri` or off."""
    directory.mkdir(mode=0o700)
    (directory / "bin").mkdir()
    (directory / "bin/containerd-shim-kata-v2").symlink_to(BIN / "containerd-shim-kata-v2")
    unused = [f"io.containerd.snapshotter.v1.{name}" for name in UNUSED]
    disabled = ", ".join(map(json.dumps, unused if cri else [*unused, "io.containerd.grpc.v1.cri"]))
    text = CONFIGURATION.format(directory=directory, disabled=disabled)
    (directory / "config.toml").write_text(text + cri)
    own = {**environment(root, config), "PATH": f"{directory}/bin:{os.environ['PATH']}"}
    daemon = Containerd(directory, own)
    try:
        daemon.start()
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.stop()


@contextmanager
def listening(daemon: Containerd) -> Iterator[Callable[[str], list[str]]]:
    """Hear events: yields what waits for a topic and returns all that came by then, as lines."""
    with Call(daemon.command("events"), stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        output, heard = running.stdout.fileno(), b""

        def hears(timeout: float) -> bool:
            nonlocal heard
            if not select.select([output], [], [], timeout)[0]:
                return False
            data = os.read(output, 65536)
            assert data, "ctr events has ended"
            heard += data
            return True

        def until(topic: str) -> list[str]:
            while True:
                whole = heard.decode().split("\n")[:-1]
                lines = [line for line in whole if PROBE not in line]
                if any(topic in line for line in lines):
                    return lines
                assert hears(PATIENCE), f"no {topic} after {heard!r}"

        try:
            # It does not tell when it listens: what comes before is lost.
            started = time.monotonic()
            for number in itertools.count():
                probed = daemon("namespaces", "label", "default", f"probe={number}")
                assert probed.status == 0, probed
                if hears(LOOK):
                    break
                assert time.monotonic() - started < PATIENCE, "no event is heard"
            yield until
        finally:
            running.kill()


def topics(events: list[str]) -> list[str]:
    """The topics of tasks' events, in order."""
    return re.findall(r"(/tasks/[a-z-]+)", "".join(events))
