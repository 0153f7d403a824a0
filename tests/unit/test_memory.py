"""What is remembered, and what is given back, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kata_shim.memory import give_back, remember

pytestmark = pytest.mark.quick

# Blocks that malloc takes from its heap, of which the last holds the others there.
HEAP = """
from pathlib import Path
from kata_shim.memory import give_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
blocks = [bytes([1]) * 60_000 for _ in range(1000)]
del blocks[:-1]
before = resident()
give_back()
print(before - resident())
"""


def test_the_last_results_are_remembered_until_they_are_given_back() -> None:
    asked = []

    @remember(2)
    def double(number: int) -> int:
        asked.append(number)
        return 2 * number

    assert [double(number) for number in (1, 2, 2, 1, 3, 2)] == [2, 4, 4, 2, 6, 4]
    assert asked == [1, 2, 3, 2]
    give_back()
    assert (double(2), asked) == (4, [1, 2, 3, 2, 2])


def test_what_is_free_below_a_block_in_use_goes_to_the_kernel() -> None:
    done = subprocess.run([sys.executable, "-c", HEAP], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) > 50 << 20
