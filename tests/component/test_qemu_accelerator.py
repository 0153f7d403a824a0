"""Which accelerator runs the kernel: the trial is bounded, tells why, and is made once."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu import accelerator
from kata_shim.qemu.accelerator import Accelerator, find
from kata_shim.qemu.process import read_start_time
from tests.component.qemu_machine import QEMU

pytestmark = pytest.mark.quick


async def test_a_kernel_that_is_none_never_runs_under_kvm(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel" * 1000)
    begun = time.monotonic()
    found = await find(QEMU, str(kernel), tmp_path / "cache.json")
    assert time.monotonic() - begun < accelerator.TRIAL_SECONDS + 30
    assert found.name == "tcg"
    assert found.cpu_model.startswith("max")
    assert "KVM" in found.reason or "/dev/kvm" in found.reason


async def test_it_is_remembered_until_the_kernel_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM", str(tmp_path / "kvm"))
    kernel, cache = tmp_path / "kernel", tmp_path / "cache.json"
    kernel.write_bytes(b"1")
    first = await find(QEMU, str(kernel), cache)
    assert first == Accelerator("tcg", first.cpu_model, f"{tmp_path}/kvm is missing or not accessible")
    written = cache.stat()
    assert await find(QEMU, str(kernel), cache) == first
    assert cache.stat().st_ino == written.st_ino
    kernel.write_bytes(b"22")
    assert await find(QEMU, str(kernel), cache) == first
    assert cache.stat().st_ino != written.st_ino
    assert set(os.listdir(tmp_path)) == {"kernel", "cache.json"}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"key": 1}', b"\xff"])
async def test_a_broken_cache_only_costs_another_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(accelerator, "KVM", str(tmp_path / "kvm"))
    (tmp_path / "kernel").write_bytes(b"1")
    (tmp_path / "cache.json").write_bytes(content)
    assert (await find(QEMU, str(tmp_path / "kernel"), tmp_path / "cache.json")).name == "tcg"


async def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM", str(tmp_path / "kvm"))
    (tmp_path / "kernel").write_bytes(b"1")
    assert (await find(QEMU, str(tmp_path / "kernel"), tmp_path / "no" / "cache.json")).name == "tcg"


async def test_what_is_missing_is_named_by_its_field(tmp_path: Path) -> None:
    with pytest.raises(ShimError, match="path: /no/qemu does not exist"):
        await find("/no/qemu", str(tmp_path), tmp_path / "cache")
    with pytest.raises(ShimError, match=f"kernel: {tmp_path}/none: No such file"):
        await find(QEMU, str(tmp_path / "none"), tmp_path / "cache")


async def test_the_trial_ends_in_time_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever cannot be told from a hung guest: this never ends by itself.
    monkeypatch.setattr(accelerator, "TRIAL_SECONDS", 2)
    monkeypatch.setattr(accelerator, "KVM", "/dev/null")
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho early words\nexec sleep 60\n")
    qemu.chmod(0o755)
    (tmp_path / "kernel").write_bytes(b"1")
    found = await find(str(qemu), str(tmp_path / "kernel"), tmp_path / "cache.json")
    assert "within 2 s and its last line was: early words" in found.reason


async def test_a_kernel_that_reaches_its_root_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "KVM", "/dev/null")
    qemu = tmp_path / "qemu"
    qemu.write_text(
        "#!/bin/sh\ncase $* in *-arch-capabilities*) echo 'Kernel panic - not syncing: VFS: no root';;"
        " *) echo 'qemu: error: failed to set MSR 0x10a' >&2; exit 1;; esac\n"
    )
    qemu.chmod(0o755)
    (tmp_path / "kernel").write_bytes(b"1")
    found = await find(str(qemu), str(tmp_path / "kernel"), tmp_path / "cache.json")
    assert (found.name, found.cpu_model) == ("kvm", "host,-arch-capabilities")


async def test_a_cancelled_trial_kills_its_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "KVM", "/dev/null")
    qemu, started = tmp_path / "qemu", tmp_path / "started"
    os.mkfifo(started)
    qemu.write_text(f"#!/bin/sh\necho $$ >{started}\nexec sleep 60\n")
    qemu.chmod(0o755)
    (tmp_path / "kernel").write_bytes(b"1")
    task = asyncio.create_task(find(str(qemu), str(tmp_path / "kernel"), tmp_path / "cache.json"))
    pid = int(await asyncio.to_thread(started.read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert read_start_time(pid) == 0
