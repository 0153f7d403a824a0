"""Tables for README.md, and their places in it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from bench.cases import Comparison

README = Path(__file__).with_name("README.md")
_UNITS: dict[str, Callable[[float], str]] = {
    "ms": lambda seconds: f"{seconds * 1000:.1f}",
    "MiB": lambda value: f"{value / (1 << 20):.2f}",
    "/s": lambda rate: f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
}


def table(found: Sequence[Comparison]) -> str:
    """Return one row for each comparison."""
    rows = ["| | measured | against | | ratio | reach |", "|---|---|---|---|---|---|"]
    for one in found:
        basis = values(one.basis, one.unit) if one.basis else ""
        ratio = f"**{one.ratio:.{2 if one.ratio >= 0.1 else 3}f}**" if one.basis else ""
        measured = values(one.measured, one.unit)
        rows.append(f"| {one.name} | {measured} | {one.against} | {basis} | {ratio} | {one.reach} |")
    return "\n".join(rows)


def values(found: list[float], unit: str) -> str:
    """Return the median, and the least and the most if there is more than one."""
    show = _UNITS[unit]
    suffix = unit if unit == "/s" else f" {unit}"
    middle = f"{show(median(found))}{suffix}"
    return middle if len(found) == 1 else f"{middle} ({show(min(found))} … {show(max(found))})"


def machine(accelerator: str) -> str:
    """Return what the figures depend on."""
    version = subprocess.run(
        ["/usr/bin/qemu-system-x86_64", "--version"], capture_output=True, check=True, text=True
    ).stdout
    qemu = version.partition("(")[0].removeprefix("QEMU emulator version").strip()
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, QEMU {qemu} with {accelerator.upper()},"
        f" Python {platform.python_version()}"
    )


def write(section: str, text: str) -> None:
    """Replace a section of README.md, which stands between two comments; raises RuntimeError without them."""
    begin, end = f"<!-- {section}: written by bench/run -->", f"<!-- end of {section} -->"
    pattern = re.compile(f"(?s)(?<={re.escape(begin)}\n).*(?={re.escape(end)})")
    # A function, lest a backslash in the text be a reference.
    readme, count = pattern.subn(lambda _: f"{text}\n", README.read_text())
    if count != 1:
        raise RuntimeError(f"{README} has no place for {section}: {begin}")
    README.write_text(readme)
