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
from kata_shim.sandbox.guest_kernel import Tell
from kata_shim.sandbox.ipvs import Ipvs
from tests.live import Live, live
from tests.started import PATIENCE, write_config
from tests.system.ipvs import many

CHUNK = 256  # rules in a message, in the place of many more: a few rules are more than one then
ANSWER = 8.0  # seconds that a call has, in the place of the 15 of a shim
SHARE = 14  # kills that are asked for, for each moment of each change
RULES = [rule.command for rule in parse_rules(many(30, 49))]
BEFORE = [rule.command for rule in parse_rules(many(20, 30))]
FLUSH = Command(Verb.CLEAR)
LATER = "a change that was cut is taken back as soon as the guest answers"
UNKNOWN = "whether the change was made, or still will be, is not known"


CHANGES: dict[str, tuple[list[Command], Callable[[Ipvs, Tell], Coroutine[Any, Any, object]]]] = {
    "restore": ([], lambda ipvs, tell: ipvs.fill(RULES, tell)),
    "apply": (BEFORE, lambda ipvs, tell: ipvs.apply([FLUSH, *RULES], tell)),
    "replace": (BEFORE, lambda ipvs, tell: ipvs.replace(plan.of_rules(RULES), tell, dry=False)),
}


async def nobody(done: int, total: int) -> None:
    """Who is told how far it is."""


@asynccontextmanager
async def going_on(sandbox: Live) -> AsyncIterator[None]:
    """Have QEMU go on in the end, if it was stopped."""
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
        monkeypatch.setattr(guest_kernel, "CHUNK", CHUNK)
        monkeypatch.setattr(guest_kernel, "FIRST", CHUNK)
        for name in CHANGES:
            for _ in range(max(1, request.config.getoption("kills") // SHARE)):
                try:
                    await stopped(sandbox, ipvs, name, chance)
                except BaseException as error:
                    error.add_note(f"--seed {seed}, {name}")
                    raise
        await broken(sandbox, ipvs)
        await one_command(sandbox, ipvs)


async def stopped(sandbox: Live, ipvs: Ipvs, name: str, chance: random.Random) -> None:
    """Stop QEMU in the middle of a change: that is told, and taken back by itself once it goes on."""
    rules, change = CHANGES[name]
    await ipvs.replace(plan.of_rules(rules), nobody, dry=False)
    before, moment = await saved(sandbox), chance.random()

    async def tell(done: int, total: int) -> None:
        # One message may be under way by now.
        if moment * (total - 2 * CHUNK) <= done < total - CHUNK:
            pid = sandbox.sandbox.record.pid
            os.kill(pid, signal.SIGSTOP)
            await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    async with going_on(sandbox):
        with pytest.raises(ShimError) as caught:
            await change(ipvs, tell)
        assert caught.value.code == "deadline-exceeded", caught.value.message
        assert caught.value.message.endswith(LATER), caught.value.message
        assert (sandbox.sandbox.directory / "ipvs-before").exists()
    assert ipvs._waiting is not None
    await asyncio.wait_for(ipvs._waiting, PATIENCE)
    assert await saved(sandbox) == before
    assert not (sandbox.sandbox.directory / "ipvs-before").exists()


async def broken(sandbox: Live, ipvs: Ipvs) -> None:
    """The channel ends while a silent guest is waited for: what was cut is taken back all the same."""
    await ipvs.change(FLUSH, limited=False)

    async def tell(done: int, total: int) -> None:
        os.kill(sandbox.sandbox.record.pid, signal.SIGSTOP)

    async with going_on(sandbox):
        with pytest.raises(ShimError):
            await ipvs.fill(RULES, tell)
        client = sandbox.machine.agent._client
        assert client is not None
        client.close()
    assert ipvs._waiting is not None
    await asyncio.wait_for(ipvs._waiting, PATIENCE)
    assert await saved(sandbox) == []
    assert not (sandbox.sandbox.directory / "ipvs-before").exists()


async def one_command(sandbox: Live, ipvs: Ipvs) -> None:
    """A single command may be carried out after it was given up; nobody is told that it failed."""
    await ipvs.change(FLUSH, limited=False)
    async with going_on(sandbox):
        os.kill(sandbox.sandbox.record.pid, signal.SIGSTOP)
        with pytest.raises(ShimError) as caught:
            await ipvs.change(parse_parameters("-A -t 10.0.0.1:80 -s rr -p 1"), limited=False)
    assert caught.value.code == "deadline-exceeded"
    assert caught.value.message.endswith(UNKNOWN)
    assert await saved(sandbox) == ["-A -t 10.0.0.1:80 -s rr -p 1"]
