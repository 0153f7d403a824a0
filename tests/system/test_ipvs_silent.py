"""A guest that stands still while its IPVS table changes: a bounded, worded end, and then a whole table.

More moments, drawn anew: `pytest tests/system/test_ipvs_silent.py --kills 200 --seed 7`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kata_shim.agent import Agent
from kata_shim.contract.ipvs import parse_parameters, parse_rules
from kata_shim.errors import ShimError
from kata_shim.ipvs import plan
from kata_shim.ipvs.command import Command, Verb
from kata_shim.sandbox import guest_kernel
from kata_shim.sandbox.ipvs import Ipvs
from tests.live import Live, live
from tests.started import PATIENCE, write_config
from tests.system.ipvs import many

ANSWER = 1.0  # seconds that a call has, in the place of the 15 of a shim
SHARE = 14  # kills that are asked for, for each moment of each change
RULES = [rule.command for rule in parse_rules(many(30, 49))]
BEFORE = [rule.command for rule in parse_rules(many(20, 30))]
FLUSH = Command(Verb.CLEAR)
LATER = "a change that was cut is taken back as soon as the guest answers"
UNKNOWN = "whether the change was made, or still will be, is not known"


async def nobody(done: int, total: int) -> None:
    """Who is told how far it is."""


CHANGES: dict[str, tuple[list[Command], Callable[[Ipvs], Coroutine[Any, Any, object]]]] = {
    "restore": ([], lambda ipvs: ipvs.fill(RULES, nobody)),
    "apply": (BEFORE, lambda ipvs: ipvs.apply([FLUSH, *RULES], nobody)),
    "replace": (BEFORE, lambda ipvs: ipvs.replace(plan.of_rules(RULES), nobody, dry=False)),
}


@asynccontextmanager
async def frozen(sandbox: Live) -> AsyncIterator[None]:
    """Have QEMU stand still."""
    os.kill(sandbox.sandbox.record.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(sandbox.sandbox.record.pid, signal.SIGCONT)


async def saved(sandbox: Live) -> list[str]:
    """The table as the guest's own ipvsadm saves it."""
    return sorted((await sandbox.run("ipvsadm", "-Sn")).splitlines())


async def test_silent_guest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    seed = request.config.getoption("seed")
    chance = random.Random(seed)
    (root / "sandboxes" / "silent").mkdir(parents=True, mode=0o700)
    config = write_config(tmp_path / "configuration.toml", root / "template", accelerator="tcg")
    async with live(root, "silent", config) as sandbox:
        ipvs = await sandbox.sandbox.ipvs()
        monkeypatch.setattr(Agent._ours, "__defaults__", (ANSWER,))
        monkeypatch.setattr(guest_kernel, "CHUNK", 256)  # so that a few rules are more than one message
        for name in CHANGES:
            for _ in range(max(1, request.config.getoption("kills") // SHARE)):
                try:
                    await stopped(sandbox, ipvs, name, chance)
                except BaseException as error:
                    error.add_note(f"--seed {seed}, {name}")
                    raise
        await one_command(sandbox, ipvs)


async def stopped(sandbox: Live, ipvs: Ipvs, name: str, chance: random.Random) -> None:
    """Stop QEMU at a moment of a change: what is left is told, and taken back by itself once it goes on."""
    loop = asyncio.get_running_loop()
    rules, change = CHANGES[name]
    await ipvs.replace(plan.of_rules(rules), nobody, dry=False)
    before, began = await saved(sandbox), loop.time()
    await change(ipvs)
    seconds, whole = loop.time() - began, await saved(sandbox)
    await ipvs.replace(plan.of_rules(rules), nobody, dry=False)
    assert await saved(sandbox) == before
    task = asyncio.create_task(change(ipvs))
    await asyncio.wait([task], timeout=chance.uniform(0, seconds))
    async with frozen(sandbox):
        (error,) = await asyncio.gather(task, return_exceptions=True)
        journal = (sandbox.sandbox.directory / "ipvs-before").exists()
    if isinstance(error, ShimError):
        assert error.code == "deadline-exceeded", error.message
        assert error.message.endswith(LATER) == journal, error.message
    else:
        assert not isinstance(error, BaseException)
        assert not journal
    if ipvs._waiting is not None:
        await asyncio.wait_for(ipvs._waiting, PATIENCE)
    found = await saved(sandbox)
    assert found in ((before,) if isinstance(error, ShimError) else (whole,))
    assert not (sandbox.sandbox.directory / "ipvs-before").exists()


async def one_command(sandbox: Live, ipvs: Ipvs) -> None:
    """A single command may be carried out after it was given up; nobody is told that it failed."""
    await ipvs.change(FLUSH, limited=False)
    async with frozen(sandbox):
        with pytest.raises(ShimError) as caught:
            await ipvs.change(parse_parameters("-A -t 10.0.0.1:80 -s rr -p 1"), limited=False)
    assert caught.value.code == "deadline-exceeded"
    assert caught.value.message.endswith(UNKNOWN)
    assert await saved(sandbox) == ["-A -t 10.0.0.1:80 -s rr -p 1"]
