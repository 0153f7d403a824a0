"""kill -9 of any process of ours at any moment: the next command, or `factory destroy`, leaves nothing.

More of them, drawn anew: `pytest tests/system/test_kills.py --kills 200 --seed 7`.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.factory import configure
from tests.node import MOMENTS, Node
from tests.support import Runtime

VMS = 2  # one waits while the other is handed over
TWO = 0.3  # of all kills: those of two processes at once
HITS = 0.6  # of all kills: what is to be killed has ended at times before the moment has come


def test_kills(root: Path, request: pytest.FixtureRequest) -> None:
    directory = root / "kills"
    (directory / "run").mkdir(0o700, parents=True)
    own = Runtime(directory / "root", configure(directory / "kills.toml", directory, VMS))
    seed, kills = request.config.getoption("seed"), request.config.getoption("kills")
    chance = random.Random(seed)
    sorts = [(moment, victim) for moment, victims in MOMENTS.items() for victim in victims]
    node, hits, drawn = Node(own, directory, VMS, chance), 0, list[tuple[str, str]]()
    try:
        for number in range(kills):
            drawn = drawn or chance.sample(sorts, len(sorts))
            moment, victim = drawn.pop()
            others = [other for other in MOMENTS[moment] if other != victim]
            victims = [victim, chance.choice(others)] if chance.random() < TWO else [victim]
            try:
                hits += node.kill(moment, victims)
            except BaseException as error:
                error.add_note(f"--seed {seed}, kill {number + 1}: {' and '.join(victims)}, at {moment}")
                raise
        node.destroy()
    finally:
        node.clear()
        shutil.rmtree(directory)
    assert hits >= HITS * kills
