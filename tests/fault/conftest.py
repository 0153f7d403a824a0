"""What the trials share: a sandbox whose every step a test can reach, on a disk that a test can fill."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.fault.trial import GIVEN, reset_tap
from tests.live import Live, live
from tests.support import shipped
from tests.system.network import ip

ID = "undo"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path) -> AsyncIterator[Live]:
    """A sandbox whose root of state is a disk of its own, small enough to be filled; and a tap for it."""
    own = root / ID
    own.mkdir(mode=0o700)
    _mount(own)
    (own / "sandboxes" / ID).mkdir(parents=True, mode=0o700)
    ip("tuntap", "add", GIVEN.device, "mode", "tap")
    reset_tap()
    try:
        async with live(own, ID, shipped(root, shared_memory=True)) as running:
            yield running
    finally:
        ip("link", "delete", GIVEN.device)
        _unmount(own)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def clean(sandbox: Live) -> AsyncIterator[None]:
    """Let a test that fails spoil no other."""
    yield
    await sandbox.monitor.execute("cont")
    for interface in sandbox.network.interfaces():
        await sandbox.network.delete(interface.name)
    reset_tap()


def _mount(directory: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "undo", directory],
        check=True,
    )


def _unmount(directory: Path) -> None:
    subprocess.run(["umount", directory], check=True)
    directory.rmdir()
