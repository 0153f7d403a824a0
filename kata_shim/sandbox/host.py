"""What this host offers a sandbox: `kata-runtime kata-check`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from kata_shim.config import Hypervisor, find_config, load
from kata_shim.errors import ShimError
from kata_shim.qemu import accelerator
from kata_shim.sandbox import preconditions

VERSION_TIMEOUT = 5.0  # seconds
DEVICES = {
    "tun": "/dev/net/tun",
    "kvm": "/dev/kvm",
    "vhost_net": "/dev/vhost-net",
    "vsock": "/dev/vhost-vsock",
}


async def check(root: Path, config: str) -> dict[str, object]:
    """Return what was found out, `ok` first: whether a sandbox of this configuration can run here.

    Raises nothing of the host's or the configuration's faults: they are the `problems`, in words.
    """
    found: dict[str, object] = {"ok": False}
    problems: list[str] = []
    for name, device in DEVICES.items():
        found[name] = os.access(device, os.R_OK | os.W_OK)
    try:
        path = find_config(config or None)
        settings, warnings = load(path)
        problems += warnings
        found["config"] = str(path)
        found |= {"machine_type": settings.hypervisor.machine_type, "kernel": settings.hypervisor.kernel}
        preconditions.check(settings)
        found["qemu"] = await _qemu_version(settings.hypervisor.path)
        found |= await _accelerator(settings.hypervisor, root)
        if not found["tun"]:
            raise ShimError("failed-precondition", f"{DEVICES['tun']} is missing: no tap can be opened")
        found["ok"] = True
    except ShimError as error:
        problems.append(error.message)
    except OSError as error:
        problems.append(f"{error.filename or 'the host'}: {error.strerror}")
    return {**found, "problems": problems}


async def _accelerator(hypervisor: Hypervisor, root: Path) -> dict[str, object]:
    if hypervisor.accelerator != "auto":
        return {"accelerator": hypervisor.accelerator, "reason": "configured"}
    os.makedirs(root, mode=0o700, exist_ok=True)
    found = await accelerator.find(hypervisor.path, hypervisor.kernel, root / "accelerator.json")
    return {"accelerator": found.name, "reason": found.reason}


async def _qemu_version(path: str) -> str:
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(VERSION_TIMEOUT):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise ShimError("failed-precondition", f"path: {path} does not tell its version") from None
    return output.decode(errors="replace").partition("\n")[0]
