"""bench/run [a|b|c|d|e]… [--rounds N] [--write]: measure and print a table; --write: into README.md too."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from pathlib import Path
from statistics import median

from bench import cases
from bench.cases import Comparison
from bench.reattach import reattach
from bench.stand import Stand

CASES = {
    "a": cases.hotplug,
    "b": cases.listing,
    "c": cases.at_once,
    "d": cases.requests,
    "e": reattach,
}
ROUNDS = 15
README = Path(__file__).with_name("README.md")
WATERFALL = README.with_name("waterfall.md")  # written by hand
HEAD = """# What it costs

Medians of interleaved rounds, in one run of

    bench/run --rounds {rounds} --write

on {machine}. In brackets the least and the most.

- *The same by hand* (a): tap, MTU and QMP commands on the same sandbox, by a program that has the monitor
  to itself and sends all it can in one write, until a minimal program that waits in the guest has answered
  the kernel's RTM_NEWLINK with one ready-made netlink write; removal until DEVICE_DELETED, `netdev_del` and
  the guest's RTM_DELLINK (bench/floor.py, bench/in_guest.py).
- *At once* and *one after another* (c) are requests on one connection, or CLI calls (processes).
- *After the shim was killed* (e), by SIGKILL and with a NIC on record, the call starts a shim, which takes
  QEMU and guest over; its reach is a time, not a ratio.
"""


def main() -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    options.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    options.add_argument("--write", action="store_true", help="write bench/README.md")
    given = options.parse_args()
    found: list[Comparison] = []
    with Stand() as stand:
        machine = _machine(stand)
        for case in given.cases or CASES:
            found += CASES[case](stand, given.rounds)
    table = _table(found)
    print(table)
    if given.write:
        head = HEAD.format(rounds=given.rounds, machine=machine)
        README.write_text("\n".join([head, table, "", WATERFALL.read_text()]).rstrip("\n") + "\n")


def _table(found: list[Comparison]) -> str:
    rows = ["| | measured | against | | ratio | reach |", "|---|---|---|---|---|---|"]
    for one in found:
        rate = not one.basis
        basis = "" if rate else _times(one.basis)
        ratio = "" if rate else f"**{one.ratio:.2f}**"
        measured = _rates(one.measured) if rate else _times(one.measured)
        rows.append(f"| {one.name} | {measured} | {one.against} | {basis} | {ratio} | {one.reach} |")
    return "\n".join(rows)


def _times(seconds: list[float]) -> str:
    middle, low, high = (f"{value * 1000:.1f}" for value in (median(seconds), min(seconds), max(seconds)))
    return f"{middle} ms ({low} … {high})"


def _rates(values: list[float]) -> str:
    return f"{median(values):,.0f}/s ({min(values):,.0f} … {max(values):,.0f})"


def _machine(stand: Stand) -> str:
    version = subprocess.run(
        ["/usr/bin/qemu-system-x86_64", "--version"], capture_output=True, check=True, text=True
    ).stdout
    qemu = version.partition("(")[0].removeprefix("QEMU emulator version").strip()
    accelerator = stand.state()["accelerator"]
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, QEMU {qemu} with {accelerator.upper()},"
        f" Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
