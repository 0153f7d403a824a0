"""The guest's console: its last lines are kept, and no guest can fill the log with it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from kata_shim.qemu.console import KEPT_LINES, LOGGED_LINES, Console

pytestmark = pytest.mark.quick


async def test_a_guest_that_prints_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    printed = [f"line {number}" for number in range(LOGGED_LINES + 50)]

    async def guest(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write("".join(f"{line}\r\n" for line in printed).encode())
        writer.close()
        await writer.wait_closed()

    monkeypatch.setattr(logging.getLogger("kata_shim"), "propagate", True)
    caplog.set_level(logging.DEBUG, "kata_shim")
    console = Console()
    async with await asyncio.start_unix_server(guest, tmp_path / "console.sock"):
        await console.connect(tmp_path / "console.sock")
        await console.drain()
        await console.close()
    assert list(console.lines) == printed[-KEPT_LINES:]
    *lines, end = [record for record in caplog.records if record.name == "kata_shim"]
    assert [vars(record)["fields"]["line"] for record in lines] == printed[:LOGGED_LINES]
    assert end.getMessage() == "console: no more of it is logged"
