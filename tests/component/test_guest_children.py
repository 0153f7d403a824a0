"""Children of the agent as PID 1 of a namespace of their own: whom a kill reaches, and whom it spares."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick

# A command has ended and so has what it left; an innocent process gets its number (proc(5), ns_last_pid).
REUSED = """
import asyncio, os, signal, subprocess
from pathlib import Path
from kata_shim.guest.children import Children

async def main():
    children = Children()
    child = children.spawn(
        ["sh", "-c", "sleep 60 & echo $!"], env=os.environ, cwd="/", stdin=False, stdout=-1, stderr=None
    )
    await child.exited
    left = int(child.process.stdout.readline())
    child.process.stdout.close()
    assert child.survived
    os.kill(left, signal.SIGKILL)
    while Path(f"/proc/{left}").exists():
        await asyncio.sleep(0)
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(child.process.pid - 1))
    innocent = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert innocent.pid == child.process.pid
    child.kill(signal.SIGKILL)
    children.close()
    innocent.terminate()
    assert innocent.wait() == -signal.SIGTERM

asyncio.run(main())
"""


def test_a_number_that_is_used_again() -> None:
    """Who has the number of a command that is gone with its whole group is not killed."""
    subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", REUSED], check=True)
