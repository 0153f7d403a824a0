"""Rules in the plain form are read by a shorter way, which must know no other rules than the long one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.contract.ipvs import parse_parameters, parse_plain, parse_rules
from kata_shim.errors import ShimError
from kata_shim.ipvs.command import Command

pytestmark = pytest.mark.quick

# Few of each, so that lines share some: what is shared is read once.
addresses = st.sampled_from(
    ["10.0.0.1:80", "10.0.0.1:81", "10.0.0.2:80", "[fd00::1]:80", "[fd00::2]:443", "255.255.255.255:65535"]
)
wrong_addresses = st.sampled_from(
    [
        ":80",
        "x:80",
        "-t",
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.01:80",
        "10.0.0.256:80",
        "10.0.0:80",
        "10.0.0.1:８",
        "10.0.0.1:080",
        "10.0.0.1:+8",
        "fd00::1:80",
        "[10.0.0.1]:80",
        "[fd00::g]:80",
        "[fd00::1]",
        "",
    ]
)
any_address = addresses | wrong_addresses
options = st.sampled_from(["-t", "-u", "-t", "-u", "--tcp-service", "-f", "-A"])
ways = st.sampled_from(["-m", "-i", "-g", "-m", "-i", "-g", "--masquerading", "-mi", "-n", "-w"])
numbers = st.sampled_from(
    [
        "0",
        "1",
        "3000",
        "65535",
        "65536",
        "2678400",
        "2678401",
        "007",
        "-1",
        "+1",
        "1_0",
        "٣",
        "999999999",
        "9999999999",
        "x",
    ]
)
schedulers = st.sampled_from(["rr", "wlc", "nq", "mh", "RR", "-s", "r"])
plain_lines = st.one_of(
    st.tuples(
        st.just("-A"), options, any_address, st.just("-s"), schedulers, st.just("-p"), numbers
    ),
    st.tuples(st.just("-a"), options, any_address, st.just("-r"), any_address, ways),
    st.tuples(st.just("-a"), options, any_address, st.just("-r"), any_address, ways, st.just("-w"), numbers),
)  # fmt: skip
lines = plain_lines.map(" ".join)


@given(st.lists(lines, min_size=1, max_size=6))
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


@pytest.mark.parametrize("option", ["-t", "-u"])
@pytest.mark.parametrize("host", ["10.0.0.1", "[fd00::1]"])
@pytest.mark.parametrize(
    "words",
    ["-A {} {}:80 -s wrr -p 300", "-a {} {}:80 -r {}:90 -m", "-a {} {}:80 -r {}:90 -i -w 65535"],
)
def test_the_plain_form_takes_the_shorter_way(option: str, host: str, words: str) -> None:
    line = words.format(option, host, host)
    assert parse_plain(line.split()) == _alone(line)


def _alone(line: str) -> Command | str:
    """Return what a line means by the long way, or why it is refused."""
    try:
        return parse_parameters(line)  # which differs from a file in the way to a server that names none
    except ShimError as error:
        return error.message
