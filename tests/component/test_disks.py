"""How what becomes a disk is opened: for nobody else, and not for longer than somebody wants it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from kata_shim.sandbox.disks import _opened
from tests.disks import MIB, is_free, loop_device
from tests.started import opened

pytestmark = pytest.mark.quick


async def test_a_claim_lasts_as_long_as_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    with loop_device(tmp_path / "image") as device:
        async with _opened(device, []) as backing:
            assert (backing.is_device, backing.readonly) == (True, False)
            assert not is_free(device)
        assert is_free(device)


async def test_who_gives_up_while_it_is_opened_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(MIB))
    with loop_device(tmp_path / "image") as device:

        async def claim() -> None:
            async with _opened(device, []):
                raise AssertionError("it was not given up")

        claiming = asyncio.create_task(claim())
        await asyncio.sleep(0)  # it is a thread's by now
        claiming.cancel()
        await asyncio.wait((claiming,))
        assert claiming.cancelled()
        assert is_free(device)
        assert device not in opened(os.getpid())
