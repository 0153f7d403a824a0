"""bench/run [CASE]… [--rounds N] [--cycles N] [--seconds N] [--write]: measure and print tables.

The cases are the letters of README.md, `waterfall` and `leaks`; without any, all but leaks. With --write each
section of README.md is replaced of which all cases were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable

from bench import cases, containers, ipvs, memory, pods, report, start, waterfall
from bench.cases import Comparison
from bench.leaks import leaks
from bench.leaks import text as leaks_text
from bench.load import load
from bench.place import Ground, Place
from bench.reattach import reattach
from bench.stand import Stand

NETWORK: dict[str, Callable[[Stand, int], list[Comparison]]] = {
    "a": cases.hotplug,
    "b": cases.listing,
    "c": cases.at_once,
    "d": cases.requests,
    "e": reattach,
}
IPVS: dict[str, Callable[[Stand, int], list[Comparison]]] = {
    "k": ipvs.restore,
    "m": ipvs.single,
    "n": ipvs.memory,
}
FACTORY: dict[str, Callable[[Ground, int], list[Comparison]]] = {
    "f": start.ways,
    "g": start.detached,
    "h": start.together,
    "i": memory.memory,
    "j": start.images,
}
CONTAINERS: dict[str, Callable[[Ground, int], list[Comparison]]] = {
    "p": containers.lives,
    "q": containers.streams,
    "r": containers.together,
    "s": pods.pods,
}
LOAD, WATERFALL, LEAKS = "o", "waterfall", "leaks"
ROUNDS, CYCLES, SECONDS = 15, 1000, 60


def main() -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    names = [*NETWORK, *IPVS, LOAD, *FACTORY, *CONTAINERS, WATERFALL, LEAKS]
    options.add_argument(
        "cases", nargs="*", metavar="CASE", choices=[*names, []], help="default: all but leaks"
    )
    options.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    options.add_argument("--cycles", type=int, default=CYCLES, help="of leaks; default: %(default)s")
    options.add_argument("--seconds", type=int, default=SECONDS, help="of o; default: %(default)s")
    options.add_argument("--write", action="store_true", help="write bench/README.md")
    given = options.parse_args()
    # As by SIGINT: what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if descriptor := os.environ.get("BENCH_NETWORK"):
        os.environ["BENCH_NETWORK"] = _own(int(descriptor))
    wanted = given.cases or names[:-1]
    with Ground() as ground:
        machine = report.machine(_accelerator(ground))
        for section, group in (("network", NETWORK), ("ipvs", IPVS)):
            if letters := [case for case in wanted if case in group]:
                found = []
                with Stand(ground) as stand:
                    for letter in letters:
                        found += group[letter](stand, given.rounds)
                _give(section, machine, report.table(found), given, whole=len(letters) == len(group))
        if LOAD in wanted:
            _give("load", machine, load(ground, given.seconds), given)
        for section, places in (("factory", FACTORY), ("containers", CONTAINERS)):
            if letters := [case for case in wanted if case in places]:
                found = [row for letter in letters for row in places[letter](ground, given.rounds)]
                _give(section, machine, report.table(found), given, whole=len(letters) == len(places))
        if WATERFALL in wanted:
            fall, plain = waterfall.measure(ground, given.rounds)
            if given.write:
                waterfall.write(report.README.parent, fall)
            _give(WATERFALL, machine, waterfall.text(fall, plain), given)
        if LEAKS in wanted:
            _give(LEAKS, machine, leaks_text(*leaks(ground, given.cycles)), given)


def _give(section: str, machine: str, text: str, given: argparse.Namespace, *, whole: bool = True) -> None:
    print(f"{text}\n", flush=True)
    if given.write and whole:
        rounds = f"--rounds {given.rounds}"
        how = {LEAKS: f"--cycles {given.cycles}", "load": f"--seconds {given.seconds}"}
        report.write(section, f"In one run, {how.get(section, rounds)}, on {machine}.\n\n{text}")


def _own(descriptor: int) -> str:
    """Return a path of a descriptor, which no process that is started has then."""
    os.set_inheritable(descriptor, False)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _accelerator(ground: Ground) -> str:
    with Place(ground, "check") as place:
        return str(json.loads(place.cli("kata-check", "--json"))["accelerator"])


if __name__ == "__main__":
    main()
