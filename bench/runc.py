"""containerd's own shims, to compare with: `python -m bench.runc DIRECTORY COUNT` prints their PSS as JSON.

containerd, runc and busybox are Debian's, unpacked into the directory and not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("containerd", "runc", "busybox-static")
CONFIGURATION = """version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{0}/containerd.sock"
[ttrpc]
address = "{0}/ttrpc.sock"
"""
START_TIMEOUT = 30.0  # seconds
IDLE = 10.0  # seconds, as for ours


def main() -> None:
    """Run the command line."""
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    unpacked = _unpack(directory)
    os.environ["PATH"] = f"{unpacked}/usr/bin:{unpacked}/usr/sbin:{os.environ['PATH']}"
    (directory / "rootfs/bin").mkdir(parents=True)
    os.link(unpacked / "bin/busybox", directory / "rootfs/bin/busybox")
    names = [f"c{number}" for number in range(count)]
    with _containerd(directory):
        try:
            for name in names:
                rootfs = str(directory / "rootfs")
                _ctr(directory, "run", "--detach", "--rootfs", rootfs, name, "/bin/busybox", "sleep", "86400")
            time.sleep(IDLE)
            program = unpacked / "usr/bin/containerd-shim-runc-v2"
            print(json.dumps([_pss(process) for process in shims(program)]))
        finally:
            for name in names:
                _ctr(directory, "tasks", "delete", "--force", name)


def _unpack(directory: Path) -> Path:
    unpacked = directory / "unpacked"
    # We are in a network namespace that reaches nobody; this names the one that bench/run was started in.
    network = os.environ.get("BENCH_NETWORK", "/proc/self/ns/net")
    command = ["nsenter", f"--net={network}", "apt-get", "-qq"]
    command += ["-o", "APT::Sandbox::User=root", "download", *PACKAGES]
    subprocess.run(command, cwd=directory, check=True, stdout=sys.stderr)
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, unpacked], check=True)
    return unpacked


@contextmanager
def _containerd(directory: Path) -> Iterator[None]:
    (directory / "config.toml").write_text(CONFIGURATION.format(directory))
    with (directory / "log").open("wb") as log:
        daemon = subprocess.Popen(["containerd", "--config", directory / "config.toml"], stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not (directory / "containerd.sock").exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((directory / "log").read_text())
            time.sleep(0.05)
        yield
    finally:
        daemon.terminate()
        daemon.wait()


def _ctr(directory: Path, *words: str) -> None:
    command = ["ctr", "--address", str(directory / "containerd.sock"), *words]
    subprocess.run(command, check=words[0] == "run", stdout=sys.stderr, stderr=subprocess.DEVNULL)


def shims(program: Path) -> list[Path]:
    """Return the processes of a containerd-shim-runc-v2."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "exe") == str(program):
                found.append(process)
        except OSError:
            continue  # it has ended
    return found


def _pss(process: Path) -> int:
    lines = (process / "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
