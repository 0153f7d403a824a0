"""Which accelerator really runs the guest's kernel: found out by a bounded trial, and remembered.

A host can list /dev/kvm and still not run a stock kernel (nested virtualisation without nested KVM), so the
kernel itself is booted, without an initrd: it works when the kernel gets as far as missing its root.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kata_shim.errors import ShimError
from kata_shim.qemu.cmdline import default_cpu_model
from kata_shim.qemu.process import last_log_line, spawn

TRIAL_SECONDS = 5.0
KVM = "/dev/kvm"
# QEMU offers ARCH_CAPABILITIES to a guest even where the host's KVM then refuses it.
KVM_CPU_MODELS = ("host", "host,-arch-capabilities")
_REACHED = b"Kernel panic - not syncing: VFS"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`name` is kvm or tcg, `cpu_model` what to pass to -cpu with it, `reason` why, in words for the user."""

    name: str
    cpu_model: str
    reason: str


async def find(qemu: str, kernel: str, cache: Path) -> Accelerator:
    """Return the accelerator that runs `kernel`, from `cache` when nothing has changed since.

    QEMU, the kernel, /dev/kvm and the boot of the host decide whether something has changed. Takes at most
    TRIAL_SECONDS and a little; the trial's QEMU has ended when this returns. A cache that cannot be read or
    written only costs another trial. Raises ShimError `failed-precondition` naming `path` or `kernel` when
    they are missing.
    """
    key = _key(qemu, kernel)
    known = _read(cache, key)
    if known is not None:
        return known
    found = await _try_kvm(qemu, kernel)
    _write(cache, key, found)
    return found


def tcg(reason: str) -> Accelerator:
    """Return software emulation, and why."""
    return Accelerator("tcg", default_cpu_model("tcg"), reason)


async def _try_kvm(qemu: str, kernel: str) -> Accelerator:
    if not os.access(KVM, os.R_OK | os.W_OK):
        return tcg(f"{KVM} is missing or not accessible")
    clock = asyncio.get_running_loop().time
    deadline = clock() + TRIAL_SECONDS
    for cpu_model in KVM_CPU_MODELS:
        why = await _trial([qemu, *_trial_options(kernel, cpu_model)], deadline - clock())
        if not why:
            return Accelerator("kvm", cpu_model, "the guest's kernel boots under KVM")
        if clock() >= deadline:
            break
    return tcg(f"the guest's kernel does not boot under KVM: {why}")


def _trial_options(kernel: str, cpu_model: str) -> list[str]:
    options = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "q35,accel=kvm",
    ]
    options += ["-cpu", cpu_model, "-m", "256M", "-serial", "stdio", "-kernel", kernel]
    return [*options, "-append", "console=ttyS0 panic=-1 mitigations=off"]


async def _trial(argv: Sequence[str], seconds: float) -> str:
    """Boot once; return "" when the kernel ran, else why not."""
    with tempfile.TemporaryDirectory(prefix="kata-shim-trial-") as directory:
        log = Path(directory) / "log"
        process = spawn(argv, log, dies_with_us=True)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(process.exited)
        except TimeoutError:
            said = last_log_line(log)
            end = f"and its last line was: {said}" if said else "without a byte on its console"
            return f"it did not come up within {TRIAL_SECONDS:g} s {end}"
        finally:
            await process.kill()
        if _REACHED in log.read_bytes():
            return ""
        return last_log_line(log) or "QEMU ended without a word"


def _key(qemu: str, kernel: str) -> dict[str, object]:
    path = shutil.which(qemu)
    if path is None:
        raise ShimError("failed-precondition", f"path: {qemu} does not exist or is not executable")
    try:
        files = {name: os.stat(name) for name in (path, kernel)}
    except OSError as error:
        raise ShimError("failed-precondition", f"kernel: {error.filename}: {error.strerror}") from None
    key: dict[str, object] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    key["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return key | {"kvm": os.access(KVM, os.R_OK | os.W_OK)}


def _read(cache: Path, key: dict[str, object]) -> Accelerator | None:
    try:
        stored = json.loads(cache.read_bytes())
        return Accelerator(**stored["accelerator"]) if stored["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(cache: Path, key: dict[str, object], accelerator: Accelerator) -> None:
    try:
        descriptor, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}.")
        with open(descriptor, "w") as file:
            json.dump({"key": key, "accelerator": asdict(accelerator)}, file)
        os.replace(name, cache)
    except OSError:
        # Without a cache the next sandbox makes the trial again.
        return
