"""kata-ipvs and Debian's ipvsadm do the same, sequence by sequence, each in its own of two like guests.

All that may differ is named in ipvs_sides.py, or never drawn, as ipvs_lines.py says. More sequences, drawn
anew: `scripts/test differential --seed 7`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import Result, Runtime
from tests.system.ipvs_lines import Step, sequences
from tests.system.ipvs_sides import ByConnection, Sides, Theirs, by_command, prepare
from tests.system.network import booted

ENOUGH = 300  # sequences for each of ipvsadm's options to be among them
BY_COMMAND = 10  # of so many sequences one is done by the command itself, a process for each line
DRAWN = 9  # at once: the simplest and eight new ones; of more, hypothesis makes most of those before


@pytest.fixture(scope="module")
def sides(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """Two clones of the same template."""
    directory = tmp_path_factory.mktemp("differential")
    with booted(runtime, directory, "ours") as ours, booted(runtime, directory, "theirs") as other:
        prepare(ours)
        prepare(other)
        theirs = Theirs(other)
        yield Sides(ours, theirs)
        theirs.close()


def _compare(sides: Sides, ours: Callable[[Step], Result], count: int, number: int) -> set[str]:
    """Draw and compare so many sequences, and return them; the first that parts is shrunk to the least."""
    agreed: set[str] = set()

    @settings(
        max_examples=DRAWN,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sequences())
    def compare(steps: list[Step]) -> None:
        text = "\n".join(map(str, steps))
        if text not in agreed:
            sides.agree(ours, steps)
            agreed.add(text)

    chance = random.Random(number)
    while len(agreed) < count:
        seed(chance.getrandbits(32))(compare)()
    return agreed


def test_they_do_the_same(sides: Sides, request: pytest.FixtureRequest) -> None:
    """Thousands of lines over one connection, which have all of ipvsadm's options."""
    ours = ByConnection(sides.ours)
    try:
        count, number = request.config.getoption("sequences"), request.config.getoption("seed")
        agreed = _compare(sides, ours, count, number)
    finally:
        ours.close()
    if count < ENOUGH:
        return
    words = {word.partition("=")[0] for text in agreed for word in text.split()}
    options = set(re.findall(r"--[a-z0-9-]+", sides.ours.run("ipvsadm", "-h").stdout))
    assert (len(options), options - words) == (56, set())


def test_the_command_does_the_same(sides: Sides, request: pytest.FixtureRequest) -> None:
    """Stdout, stderr and status are those of ipvsadm also where a process has them."""
    count, number = request.config.getoption("sequences") // BY_COMMAND, request.config.getoption("seed") + 1
    _compare(sides, by_command(sides.ours), count, number)
