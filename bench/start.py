"""How fast a sandbox starts: cold, cloned, out of the cache, many at once, and against the first image."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

from bench import timed
from bench.cases import Comparison
from bench.place import CLI, Ground, Place

AT_ONCE = (1, 2, 4, 8)
GZIP_LEVEL = 6  # gzip(1)'s own


def ways(ground: Ground, rounds: int) -> list[Comparison]:
    """(f) A machine until its guest answers: cloned, and out of the cache, against a boot."""
    against, own = "cold boot", "its own randomness, time and name"
    clone = Comparison("(f) clone, QEMU's spawn to the agent's first answer", against, "≤ 0.04 (25 × faster)")
    whole = Comparison(f"(f) clone, QEMU's spawn to {own}", against, "")
    taken = Comparison("(f) out of the cache, asking to the agent's answer", against, "")
    ready = Comparison(f"(f) out of the cache, asking to {own}", against, "")
    with Place(ground, "cold", clone=False) as cold, Place(ground, "cache", cache=1) as cache:
        factory = cache.start_factory()
        for _ in range(rounds):
            factory.until_full()
            boot, cloned, cached = timed.cold(cold), timed.clone(cache), timed.cached(cache)
            for compared, measured, basis in (
                (clone, cloned.answered, boot.answered),
                (whole, cloned.own, boot.own),
                (taken, cached.answered, boot.answered),
                (ready, cached.own, boot.own),
            ):
                compared.measured.append(measured)
                compared.basis.append(basis)
    return [clone, whole, taken, ready]


def detached(ground: Ground, rounds: int) -> list[Comparison]:
    """(g) `run --detach` from the CLI's start to its end."""
    name, against = "(g) `run --detach`, CLI start to exit", "cold boot, no factory"
    template = Comparison(f"{name}: template, no factory", against, "≤ 250 ms")
    zygote = Comparison(f"{name}: template, factory with vm_cache_number 0", against, "≤ 250 ms")
    cached = Comparison(f"{name}: cache", against, "≤ 100 ms")
    with (
        Place(ground, "cold", clone=False) as cold,
        Place(ground, "alone") as alone,
        Place(ground, "zygote") as forked,
        Place(ground, "cache", cache=1) as cache,
    ):
        forked.start_factory()
        factory = cache.start_factory()
        for _ in range(rounds):
            booted = _run(cold, "boot")
            for compared, place, source in (
                (template, alone, "template"),
                (zygote, forked, "template"),
                (cached, cache, "cache"),
            ):
                compared.measured.append(_run(place, source))
                compared.basis.append(booted)
                factory.until_full()
    return [template, zygote, cached]


def together(ground: Ground, rounds: int) -> list[Comparison]:
    """(h) Some at a time from the template, with the factory's zygote."""
    cores = os.cpu_count() or 1
    rates = {
        count: Comparison(f"(h) {count} at a time from the template, ready per core", "", "≥ 5/s", unit="/s")
        for count in AT_ONCE
    }
    with Place(ground, "zygote") as place:
        place.start_factory()
        for _ in range(rounds):
            for count, compared in rates.items():
                names = [f"sb{number}" for number in range(count)]
                began = time.perf_counter()
                for pid in [place.spawn([CLI, "run", "--detach", name]) for name in names]:
                    place.wait(pid)
                compared.measured.append(count / (time.perf_counter() - began) / cores)
                for name in names:
                    place.cli("delete", "--force", name)
    return list(rates.values())


def images(ground: Ground, rounds: int) -> list[Comparison]:
    """(j) A cold boot as shipped, against the first image's kernel and way of packing."""
    name = "(j) cold boot, QEMU's spawn to the agent's first answer"
    compared = Comparison(name, "bzImage, gzip initrd, no parameters", "≤ 0.6")
    with Place(ground, "cold", clone=False) as place:
        packed = place.root / "initrd.gz"
        plain = Path(place.load().hypervisor.initrd).read_bytes()
        packed.write_bytes(gzip.compress(plain, GZIP_LEVEL))
        for _ in range(rounds):
            compared.measured.append(timed.cold(place).answered)
            compared.basis.append(timed.first_image(place, packed).answered)
    return [compared]


def _run(place: Place, source: str) -> float:
    """Start one sandbox, delete it, and return the seconds that its start took."""
    seconds = place.time([CLI, "run", "--detach", "one"])
    record = Path(place.root / "sandboxes/one/record.json").read_text()
    if f'"source":"{source}"' not in record:
        raise RuntimeError(f"this start was to be by {source}: {record}")
    place.cli("delete", "--force", "one")
    return seconds
