"""A guest's state to a file and back, its memory left where it is: QEMU's migration with `x-ignore-shared`.

Memory that QEMU shares (a file mapped with share=on) is not written. The state is read back by a QEMU of the
same command line, whose memory is that file, mapped any way. Reference: QEMU's qapi/migration.json.
"""

from __future__ import annotations

import asyncio

from kata_shim.errors import ShimError
from kata_shim.qemu.monitor import Monitor

SAVE_TIMEOUT = 30.0  # seconds; what is written is half a MiB
_CAPABILITIES = ("x-ignore-shared", "events")
_SAVE_FD = "state"


async def save(monitor: Monitor, state: int) -> None:
    """Write the guest's state to the open file `state`; the guest stands still afterwards.

    It is saved as one that runs, so that it runs as soon as it is loaded. Raises ShimError.
    """
    try:
        async with asyncio.timeout(SAVE_TIMEOUT), monitor.events("MIGRATION") as events:
            await _prepare(monitor)
            await monitor.pass_fd(_SAVE_FD, state)
            await monitor.execute("migrate", {"uri": f"fd:{_SAVE_FD}"})
            while (status := _status((await events.next())["data"])) != "completed":
                if status in ("failed", "cancelled"):
                    raise ShimError("internal", f"QEMU, migrate: the guest's state was not saved: {status}")
    except TimeoutError:
        text = f"QEMU, migrate: the guest's state was not saved within {SAVE_TIMEOUT:g} s"
        raise ShimError("deadline-exceeded", text) from None


async def load(monitor: Monitor, state: int) -> None:
    """Have a QEMU that waits for it (`-incoming defer`) load its inherited descriptor `state`, and run on.

    A QEMU that cannot load the state ends, and says why in its log.
    """
    async with monitor.events("RESUME") as events:
        await _prepare(monitor)
        await monitor.execute("migrate-incoming", {"uri": f"fd:{state}"})
        await events.next()


async def _prepare(monitor: Monitor) -> None:
    capabilities = [{"capability": name, "state": True} for name in _CAPABILITIES]
    await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


def _status(data: object) -> str:
    return str(data["status"]) if isinstance(data, dict) else ""
