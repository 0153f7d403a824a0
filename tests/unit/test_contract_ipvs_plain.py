"""Rules in the plain form are read by a shorter way, which must know no other rules than the long one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.contract.ipvs import parse_parameters, parse_plain, parse_rules
from kata_shim.errors import ShimError
from kata_shim.ipvs.command import Command
from kata_shim.ipvs.language import parse

pytestmark = pytest.mark.quick

PLAIN = [
    text.format(*of)
    for of in product(("-t", "-u"), ("10.0.0.1", "[fd00::1]"), ("rr", "nq"), ("-m", "-i", "-g"))
    for text in (
        "-A {0} {1}:80 -s {2} -p 2678400",
        "-a {0} {1}:80 -r {1}:65535 {3}",
        "-a {0} {1}:80 -r {1}:1 {3} -w 65535",
    )
]
# What stands in the place of one word of such a line.
ODD = [
    "-f", "-A", "-a", "-d", "-n", "-w", "-s", "-mi", "-t10.0.0.1:80", "--tcp-service", "--masquerading",
    "x", "mh", "RR", "wlc", "0", "1", "65536", "2678401", "007", "-1", "+1", "1_0", "٣", "999999999",
    ":80", "x:80", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:080", "10.0.0.1:+8", "10.0.0.1:８",
    "10.0.0.2:81", "10.0.0.01:80", "10.0.0.256:80", "10.0.0:80", "10.0.0.1.1:80", "localhost:http",
    "[fd00::2]:81", "fd00::1:80", "[10.0.0.1]:80", "[fd00::g]:80", "[fd00::1%1]:80", "[fd00::1]",
]  # fmt: skip
LINES = sorted(
    {
        " ".join((*words[:at], word, *words[at + 1 :]))
        for words in map(str.split, PLAIN)
        for at, word in product(range(len(words)), ODD)
    }
)


@pytest.mark.parametrize("line", PLAIN)
def test_the_plain_form_takes_the_shorter_way(line: str) -> None:
    assert parse_plain(line.split()) == _alone(line)


def test_each_line_means_what_it_means_by_the_long_way_in_both_dialects() -> None:
    for line in [*PLAIN, *LINES]:
        found = parse_plain(line.split())
        assert found is None or found == _alone(line) == _of_ipvsadm(line), line


@given(st.lists(st.sampled_from(PLAIN) | st.sampled_from(LINES), min_size=1, max_size=6))
def test_each_line_of_a_file_means_what_it_means_alone(file: list[str]) -> None:
    alone = [_alone(line) for line in file]
    wrong = next((number for number, found in enumerate(alone, 1) if isinstance(found, str)), None)
    if wrong is None:
        assert [rule.command for rule in parse_rules("\n".join(file))] == alone
    else:
        with pytest.raises(ShimError) as refusal:
            parse_rules("\n".join(file))
        assert refusal.value.code == "invalid-argument"
        assert refusal.value.message == f"line {wrong}: {alone[wrong - 1]}"


def _alone(line: str) -> Command | str:
    """Return what a line means by the long way, or why it is refused."""
    try:
        return parse_parameters(line)
    except ShimError as error:
        return error.message


def _of_ipvsadm(line: str) -> Command:
    """Return what a line means in ipvsadm's dialect, which also keeps the names of its options."""
    return parse(line.split())._replace(given=frozenset())
