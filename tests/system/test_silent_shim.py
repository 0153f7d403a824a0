"""A shim stopped by a signal answers nobody: none waits for ever, and a forced delete gets through."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.started import Started, shims, watched
from tests.support import Result, Runtime
from tests.system.network import agree, booted, nic


def test_stopped_shim(runtime: Runtime, tmp_path: Path) -> None:
    with booted(runtime, tmp_path, "silent") as guest, booted(runtime, tmp_path, "other"):
        assert guest.network("add-iface", nic(1)).status == 0
        (shim,) = shims(runtime.root, "silent")
        os.kill(shim, signal.SIGSTOP)
        told = runtime("list", "--json")
        states = {one["id"]: one["status"] for one in told.json}
        assert (states["silent"], states["other"]) == ("unknown", "running")
        assert told.stderr == "silent: its shim does not answer within 2 s\n"
        words = (
            f"the shim of silent (process {shim}) does not answer; `kill -CONT {shim}` wakes it if it was"
            " stopped, `kata-runtime delete --force silent` ends it and the sandbox\n"
        )
        assert runtime("state", "silent") == Result(1, "", words)
        assert runtime("delete", "silent") == Result(1, "", words)
        os.kill(shim, signal.SIGCONT)
        agree(guest)
        os.kill(shim, signal.SIGSTOP)
        with watched(shim) as shim_ended, watched(guest.record()["pid"]) as qemu_ended:
            assert runtime("delete", "--force", "silent") == Result(0, "", "")
            assert shim_ended()
            assert qemu_ended()
        assert not (runtime.root / "sandboxes" / "silent").exists()
        assert "tap1" not in os.listdir("/sys/class/net")
        assert shims(runtime.root, "other")


def test_shim_stopped_while_it_starts(runtime: Runtime) -> None:
    """Its caller can be interrupted, and leaves nothing behind."""
    run = Started(runtime, "run", "--detach", "silent")
    run.until("cloning the template")
    (shim,) = shims(runtime.root, "silent")
    with watched(shim) as ended:
        os.kill(shim, signal.SIGSTOP)
        run.signal(signal.SIGINT)
        assert run.end() == 130
        assert ended()
    assert run.shown.endswith("cancelled, but the shim did not say how it ended within 20 s\n")
    assert not (runtime.root / "sandboxes" / "silent").exists()
