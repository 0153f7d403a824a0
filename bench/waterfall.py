"""What the time of one `run --detach` from the template is spent on, as text and as SVG."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.marked import AFTER, BEFORE
from bench.place import CLI, INTERPRETER, PROJECT, Ground, Place

MARKED = f"import sys; sys.path.append({str(PROJECT)!r}); from bench.marked import main; main()"
WARM_UP = 3


class Stage(NamedTuple):
    """A stretch of the way: who is at work, at what, and the mark at its end, which of those of its name."""

    who: str
    what: str
    mark: str
    number: int = 0


STAGES = (
    Stage("CLI", "Python starts, the command line is read", f"{BEFORE} main"),
    Stage("CLI", "the command is imported, the id claimed", f"{BEFORE} connect"),
    Stage("CLI", "the zygote forks the shim", f"{BEFORE} Connection.call"),
    Stage("shim", "the shim hears what is asked of it", f"{BEFORE} Sandbox.start"),
    Stage("shim", "configuration.toml is read and checked", f"{BEFORE} RecordFile.save"),
    Stage("shim", "the record is saved", f"{AFTER} RecordFile.save"),
    Stage("shim", "the template is found by its fingerprint", f"{BEFORE} Machine.clone"),
    Stage("shim", "QEMU's process is started", f"{AFTER} spawn"),
    Stage("shim", "the record, which names QEMU, is saved", f"{AFTER} RecordFile.save", 1),
    Stage("QEMU", "QEMU starts, until its monitor has greeted", f"{AFTER} Machine._connect"),
    Stage("QEMU", "the saved state is loaded", "event MIGRATION"),
    Stage("guest", "it goes on, and takes its own randomness and name", f"{BEFORE} Agent.set_time"),
    Stage("guest", "its clock is set", f"{AFTER} Machine.clone"),
    Stage("shim", "the record is saved, the request answered", f"{AFTER} Sandbox.start"),
    Stage("CLI", "the CLI hears it", f"{AFTER} Connection.call"),
    Stage("CLI", "the CLI ends", "end"),
)
COLOURS = {"CLI": "#7a8ba8", "shim": "#3d6fb6", "QEMU": "#d08a2e", "guest": "#4f9a5b"}

Fall = list[float]  # for each stage the seconds from the start of the CLI to the stage's end


def measure(ground: Ground, rounds: int) -> tuple[Fall, list[float]]:
    """Return the medians, and the seconds of as many starts without marks, in turns."""
    falls, plain = [], []
    with Place(ground, "marked") as place, _zygote(place):
        for number in range(WARM_UP + rounds):
            fall = _fall(place)
            seconds = place.time([CLI, "run", "--detach", "plain"])
            place.cli("delete", "--force", "plain")
            if number >= WARM_UP:
                falls.append(fall)
                plain.append(seconds)
    return [median(ends) for ends in zip(*falls, strict=True)], plain


def text(fall: Fall, plain: list[float]) -> str:
    """Return the table."""
    rows = ["| from ms | ms | at work | on |", "|---|---|---|---|"]
    begin = 0.0
    for stage, end in zip(STAGES, fall, strict=True):
        rows.append(f"| {begin * 1000:.1f} | {(end - begin) * 1000:.1f} | {stage.who} | {stage.what} |")
        begin = end
    rows.append(f"| {begin * 1000:.1f} | | | without marks: {median(plain) * 1000:.1f} ms |")
    return "\n".join(rows)


def svg(fall: Fall) -> str:
    """Return the picture: a bar for each stage, one under the other, in milliseconds."""
    row, left, width, top = 22, 330, 560, 34
    total = max(fall)
    height = top + row * len(STAGES) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}"'
        ' font-family="sans-serif" font-size="12">',
        "<title>One run --detach from the template: what the time is spent on</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        *_key(left),
    ]
    begin = 0.0
    for number, (stage, end) in enumerate(zip(STAGES, fall, strict=True)):
        y, x = top + row * number, left + width * begin / total
        length = max(1.0, width * (end - begin) / total)
        lines += [
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(stage.what)}</text>',
            f'<rect x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{row - 6}"'
            f' fill="{COLOURS[stage.who]}"/>',
            f'<text x="{x + length + 4:.1f}" y="{y + 14}">{(end - begin) * 1000:.1f} ms</text>',
        ]
        begin = end
    return "\n".join([*lines, "</svg>", ""])


def _key(left: int) -> list[str]:
    lines = []
    for number, (who, colour) in enumerate(COLOURS.items()):
        x = left + 80 * number
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="20">{who}</text>')
    return lines


def _fall(place: Place) -> Fall:
    marks = place.root / "marks"
    place.environment["BENCH_MARKS"] = str(marks)
    try:
        began = time.monotonic_ns()
        place.wait(place.spawn([INTERPRETER, "-c", MARKED, "cli", "run", "--detach", "marked"]))
        ended = time.monotonic_ns()
    finally:
        del place.environment["BENCH_MARKS"]
    place.cli("delete", "--force", "marked")
    found: dict[str, list[int]] = {"end": [ended]}
    for line in marks.read_text().splitlines():
        moment, _, mark = line.partition(" ")
        found.setdefault(mark, []).append(int(moment))
    marks.unlink()
    return [(found[stage.mark][stage.number] - began) / 1e9 for stage in STAGES]


@contextmanager
def _zygote(place: Place) -> Iterator[None]:
    """Run a zygote whose shims note the time, where a factory would run its own."""
    directory = place.root / "factory"
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "zygote.sock"))
        listener.listen(1024)
        number = str(listener.fileno())
        command = [INTERPRETER, "-I", "-c", MARKED, "zygote", str(place.root), number]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def write(directory: Path, fall: Fall) -> None:
    """Write the picture."""
    (directory / "waterfall-start.svg").write_text(svg(fall))
