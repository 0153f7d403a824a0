"""Whether anything is left of a sandbox: cycles of start, add-iface and delete, and what is in between."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import linear_regression
from typing import NamedTuple

from bench.memory import available
from bench.place import CLI, Factory, Ground, Place

SAMPLES = 20  # beside the first
UNCOUNTED = 10  # cycles before the first
SETTLING = 2.0  # seconds
COUNTED = 6  # columns of a sample: cycles, and what is counted
NIC = {"device": "leaks", "name": "eth1", "mtu": 1500, "hwAddr": "02:42:20:6f:00:01"}


class Sample(NamedTuple):
    """What there is of ours while no sandbox is: first what can be counted, then memory in KiB."""

    cycles: int
    processes: int
    fds: int
    sockets: int
    links: int
    entries: int
    tmpfs: int
    factory_rss: int
    zygote_rss: int
    available: int


def leaks(ground: Ground, cycles: int) -> tuple[list[Sample], dict[str, int]]:
    """Return a sample of the beginning and of each twentieth, and how many starts went which way.

    Every second start finds a VM in the cache; the one after it comes before the next is there, and clones.
    That sandbox gets a NIC too.
    """
    ways: dict[str, int] = {}
    with Place(ground, "cycles", cache=1) as place:
        (place.root / "nic.json").write_text(json.dumps(NIC))
        factory = place.start_factory()
        for number in range(UNCOUNTED):
            _cycle(place, {}, nic=bool(number % 2))
        samples = [_settled(ground, place, factory, 0)]
        every = max(1, cycles // SAMPLES)
        for number in range(1, cycles + 1):
            if number % 2:
                factory.until_full()
            _cycle(place, ways, nic=not number % 2)
            if number % every == 0:
                samples.append(_settled(ground, place, factory, number, samples[0]))
    return samples, ways


def text(samples: list[Sample], ways: dict[str, int]) -> str:
    """Return the table, and how much each column grows by a cycle.

    What grows in the first half alone is warm: allocators and caches of the interpreter fill, once. A leak
    grows in the second half as it did in the first.
    """
    names = [name.replace("_", " ") for name in Sample._fields]
    rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    rows += [f"| {' | '.join(f'{value:,}' for value in sample)} |" for sample in samples]
    middle = len(samples) // 2
    rows += [_slopes("a cycle, first half", samples[: middle + 1])]
    rows += [_slopes("**a cycle, second half**", samples[middle:])]
    started = ", ".join(f"{count} by {way}" for way, count in sorted(ways.items()))
    return "\n".join([*rows, "", f"Starts: {started}."])


def _slopes(name: str, samples: list[Sample]) -> str:
    cycles, *columns = zip(*samples, strict=True)
    slopes = [linear_regression(cycles, column).slope for column in columns]
    return f"| {name} | {' | '.join(f'{slope:+,.3f}' for slope in slopes)} |"


def _cycle(place: Place, ways: dict[str, int], *, nic: bool) -> None:
    place.wait(place.spawn([CLI, "run", "--detach", "one"]))
    record = (place.root / "sandboxes/one/record.json").read_text()
    way = next(way for way in ("cache", "template", "boot") if f'"source":"{way}"' in record)
    ways[way] = ways.get(way, 0) + 1
    if nic:
        place.wait(place.spawn([CLI, "kata-network", "add-iface", "one", str(place.root / "nic.json")]))
    place.wait(place.spawn([CLI, "delete", "--force", "one"]))


def _settled(
    ground: Ground, place: Place, factory: Factory, cycles: int, before: Sample | None = None
) -> Sample:
    """Return a sample once nothing is more than it was `before`, or SETTLING is over.

    A shim ends a moment after its sandbox's delete has been answered, and the factory a moment after us hears
    that we have hung up.
    """
    zygote = factory.until_full()["zygote"]
    deadline = time.monotonic() + SETTLING
    while True:
        sample = _sample(ground, place, factory.pid, zygote, cycles)
        if before and all(
            now <= then for now, then in zip(sample[1:COUNTED], before[1:COUNTED], strict=True)
        ):
            return sample
        if time.monotonic() > deadline:
            return sample
        time.sleep(0.05)


def _sample(ground: Ground, place: Place, factory: int, zygote: int, cycles: int) -> Sample:
    ours = {*_processes(place), *_children(factory), *_children(zygote)}
    disk = os.statvfs(ground.path)
    return Sample(
        cycles,
        len(ours),
        sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (factory, zygote)),
        len(Path("/proc/net/unix").read_text().splitlines()) - 1,
        len(os.listdir("/sys/class/net")),
        sum(1 for _ in ground.path.rglob("*")),
        (disk.f_blocks - disk.f_bfree) * disk.f_frsize >> 10,
        _rss(factory),
        _rss(zygote),
        available() >> 10,
    )


def _processes(place: Place) -> Iterator[int]:
    """Yield every process that names the root of state, or has its stdout there."""
    root = os.fsencode(place.root)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if root in command or os.readlink(process / "fd/1").startswith(str(place.root)):
                yield int(process.name)
        except OSError:
            continue  # it has ended


def _children(pid: int) -> list[int]:
    """Return the children of a process, also those that have ended and that it has not waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
