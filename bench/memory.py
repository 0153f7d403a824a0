"""(i) What idle sandboxes hold of the host's memory, beside containerd's shims for runc."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.cases import Comparison
from bench.place import PROJECT, Factory, Ground, Place

COUNTS = (1, 50, 200)
BESIDE = 50  # shims, where they are compared with runc's
IDLE = 10.0  # seconds after the last start: a guest that has just come up still touches memory
REACHES = {("shim", 50): "≤ 5 MiB", ("all", 200): "≤ 40 MiB"}


def memory(ground: Ground, _: int) -> list[Comparison]:
    """(i) PSS at so many idle sandboxes, from the template and the zygote; one run, each process a value."""
    shims, machines, wholes, losses = [], [], [], []
    with Place(ground, "zygote") as place:
        factory = place.start_factory()
        free, started = available(), 0
        for count in COUNTS:
            for number in range(started, count):
                place.cli("run", "--detach", f"sb{number}")
            started = count
            time.sleep(IDLE)
            losses.append(_row("MemAvailable lost, each", "loss", count, [(free - available()) / count]))
            found = _pss(place, factory)
            shims.append(_row("a shim's PSS", "shim", count, found["shim"]))
            machines.append(_row("a QEMU's PSS", "qemu", count, found["qemu"]))
            everything = sum(map(sum, found.values())) / count
            wholes.append(_row("PSS of all, factory and zygote too, each", "all", count, [everything]))
    (beside,) = (row for row, count in zip(shims, COUNTS, strict=True) if count == BESIDE)
    beside.basis = _runc(BESIDE)
    beside.against = f"`containerd-shim-runc-v2` at {BESIDE}" if beside.basis else "runc's could not be run"
    return [*shims, *machines, *wholes, *losses]


def available() -> int:
    """Return the host's MemAvailable in bytes."""
    return _kib("/proc/meminfo", "MemAvailable:") * 1024


def pss(pid: int) -> int:
    """Return a process's proportional set size in bytes."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss:") * 1024


def _kib(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _row(what: str, sort: str, count: int, values: list[float]) -> Comparison:
    reach = REACHES.get((sort, count), "")
    return Comparison(f"(i) {what}, {count} idle", "", reach, values, unit="MiB")


def _pss(place: Place, factory: Factory) -> dict[str, list[float]]:
    sandboxes = json.loads(place.cli("list", "--json"))
    zygote = factory.until_full()["zygote"]
    for sandbox in sandboxes:
        stat = Path(f"/proc/{sandbox['shimPid']}/stat").read_text()
        if int(stat.rpartition(")")[2].split()[1]) != zygote:
            raise place.failure(f"the shim of {sandbox['id']} is not of the zygote's")
    pids = {
        "shim": [sandbox["shimPid"] for sandbox in sandboxes],
        "qemu": [sandbox["pid"] for sandbox in sandboxes],
        "factory": [factory.pid, zygote],
    }
    return {sort: [float(pss(pid)) for pid in each] for sort, each in pids.items()}


def _runc(count: int) -> list[float]:
    """Return the PSS of runc's shims; nothing where containerd cannot be had or run, which is said."""
    sockets = Path("/run/containerd")
    was_there = sockets.exists()
    sockets.mkdir(exist_ok=True)
    # bench/run mounts a /sys of its own, without control groups; and shims have their sockets in /run.
    script = 'umount /sys; mount -t tmpfs bench /run/containerd; exec "$@"'
    with tempfile.TemporaryDirectory(prefix="bench-runc.") as directory:
        command = [sys.executable, "-m", "bench.runc", directory, str(count)]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *command],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    if not was_there:
        sockets.rmdir()
    if done.returncode:
        print(f"containerd's shims are left out: bench.runc ended with status {done.returncode}")
        return []
    return [float(value) for value in json.loads(done.stdout)]
