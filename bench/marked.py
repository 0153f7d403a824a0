"""The CLI, and the zygote, with a note of the time at each stage of a start.

    cli WORD…         is kata-runtime WORD…
    zygote ROOT FD    is containerd-shim-kata-v2 zygote

The product's own functions run as they are; what is noted, before or after them, goes to the file that the
environment's BENCH_MARKS names, one line each: the time (CLOCK_MONOTONIC, ns) and where that was.
"""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BEFORE, AFTER = "before", "after"
# Where the time is noted: the module and the name in it.
CLI_PLACES = (
    ("kata_shim.client", "connect", (BEFORE,)),
    ("kata_shim.client", "Connection.call", (BEFORE, AFTER)),
)
SHIM_PLACES = (
    ("kata_shim.sandbox.sandbox", "Sandbox.start", (BEFORE, AFTER)),
    ("kata_shim.sandbox.sandbox", "RecordFile.save", (BEFORE, AFTER)),
    ("kata_shim.factory.launch", "Launch.run", (BEFORE,)),
    ("kata_shim.vm.machine", "Machine.clone", (BEFORE, AFTER)),
    ("kata_shim.vm.machine", "spawn", (BEFORE, AFTER)),
    ("kata_shim.vm.machine", "Machine._connect", (AFTER,)),
    ("kata_shim.vm.machine", "Agent.set_time", (BEFORE,)),
)


def note(where: str) -> None:
    """Write one line."""
    if name := os.environ.get("BENCH_MARKS"):
        line = f"{time.monotonic_ns()} {where}\n".encode()
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(file, line)
        os.close(file)


def wrap(module: str, name: str, when: "tuple[str, ...]") -> None:
    """Have the time noted whenever that function is called, or has returned."""
    holder: Any = __import__(module, fromlist=["_"])
    *classes, function = name.split(".")
    for each in classes:
        holder = getattr(holder, each)
    setattr(holder, function, marked(getattr(holder, function), name, when))


def marked(function: "Callable[..., Any]", name: str, when: "tuple[str, ...]") -> "Callable[..., Any]":
    """Return the same function with the notes; an async one is after its end when it has been awaited."""

    def call(*given: "Any", **named: "Any") -> "Any":
        if BEFORE in when:
            note(f"{BEFORE} {name}")
        result = function(*given, **named)
        if hasattr(result, "__await__"):
            return wait(result)
        if AFTER in when:
            note(f"{AFTER} {name}")
        return result

    async def wait(result: "Any") -> "Any":
        value = await result
        if AFTER in when:
            note(f"{AFTER} {name}")
        return value

    return call


def wrap_monitor() -> None:
    """Have the time noted when QEMU says that the state is loaded."""
    from kata_shim.qemu.monitor import _Client

    heard = _Client._cb_inbound

    def hear(self: _Client, message: "Any") -> "Any":
        if message.get("event") == "MIGRATION" and message["data"]["status"] == "completed":
            note("event MIGRATION")
        return heard(self, message)

    _Client._cb_inbound = hear  # type: ignore[method-assign, assignment]


def run_cli(words: "list[str]") -> None:
    """Be kata-runtime."""
    from kata_shim.cli.main import main as run

    note(f"{BEFORE} main")
    for place in CLI_PLACES:
        wrap(*place)
    sys.argv[1:] = words
    run()


def run_zygote(root: str, descriptor: str) -> int:
    """Be the zygote, whose children note."""
    from kata_shim.shim import main as run

    for place in SHIM_PLACES:
        wrap(*place)
    wrap_monitor()
    return run(["zygote", "--root", root, "--listen-fd", descriptor])


def main() -> None:
    """Run the command line."""
    role, *words = sys.argv[1:]
    if role == "cli":
        run_cli(words)
    else:
        sys.exit(run_zygote(*words))
