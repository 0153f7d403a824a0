"""A guest that answers kata-ipvs with what no kernel says: one clear error, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kata_shim.agent import Agent
from kata_shim.contract.ipvs import parse_cleanup, parse_parameters, parse_rules
from kata_shim.errors import ShimError
from kata_shim.ipvs import netlink, wire
from kata_shim.ipvs.command import Command, Verb
from kata_shim.sandbox.guest_kernel import GuestKernel
from kata_shim.sandbox.ipvs import Ipvs

RULE = "-A -t 10.0.0.1:80 -s rr -p 1"


class Liar:
    """An agent that answers each netlink message with the next of `answers`, and then with nothing."""

    def __init__(self, answers: Sequence[bytes], table: bytes = b"", lines: int = 0) -> None:
        self._answers = iter(answers)
        self._table = table
        self._lines = lines
        self.sent: list[bytes] = []

    async def netlink(self, protocol: int, messages: Sequence[bytes], most: int) -> list[bytes]:
        """Agent.netlink."""
        self.sent += messages
        return [next(self._answers, b"")]

    async def read_table(self, name: str, most: int) -> bytes:
        """Agent.read_table."""
        return self._table

    async def count_table(self, name: str) -> int:
        """Agent.count_table."""
        return self._lines


def family(sequence: int = 1) -> bytes:
    """The answer that tells IPVS's number, 32."""
    return netlink.message(16, 0, sequence, bytes(4), netlink.u16(1, 32))


def acknowledgement(sequence: int, errno: int = 0) -> bytes:
    """The kernel's answer to one message."""
    return netlink.message(2, 0, sequence, (-errno).to_bytes(4, "little", signed=True), bytes(16))


def ipvs(liar: Liar, directory: Path) -> Ipvs:
    """Operations on such a guest."""
    return Ipvs(GuestKernel(cast(Agent, liar)), directory / "ipvs-before")


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([], "the guest's kernel does not say what became of a command"),
        ([family(), b"\1\2\3"], "3 bytes are no netlink message"),
        ([family(), b"\xff" * 64], "a netlink message of 4294967295 bytes"),
        ([family(), acknowledgement(7)], "the guest's kernel answers to a command that it was not given"),
        ([family(), b""], "the guest's kernel does not say what became of a command"),
        ([netlink.message(16, 0, 1, bytes(4), b"")], "attribute 1 is missing"),
        ([acknowledgement(1, 2)], "the guest's kernel has no IPVS"),
    ],
)
async def test_a_change_that_is_not_answered_is_none(tmp_path: Path, answers: list[bytes], text: str) -> None:
    with pytest.raises(ShimError) as caught:
        await ipvs(Liar(answers), tmp_path).change(parse_parameters(RULE), limited=True)
    assert text in caught.value.message


async def test_an_answer_to_another_message_names_no_rule_of_ours(tmp_path: Path) -> None:
    """An index beyond the rules must not be looked up in them."""
    liar = Liar([family(), acknowledgement(4_000_000_000, 17)])

    async def tell(done: int, total: int) -> None:
        pass

    with pytest.raises(ShimError) as caught:
        await ipvs(liar, tmp_path).fill([rule.command for rule in parse_rules(RULE)], tell)
    assert caught.value.code == "data-loss"


def done(sequence: int = 1) -> bytes:
    """The end of a dump."""
    return netlink.message(3, 0, sequence, bytes(4), b"")


async def test_a_table_that_is_not_told_to_its_end_is_none(tmp_path: Path) -> None:
    """What is missing there would be deleted by an undo."""
    service = wire.message(Command(Verb.ADD_SERVICE, parse_parameters(RULE).service), 32, 1)
    for answers in ([service], [service + done()], [service + done(), done(7)]):
        with pytest.raises(ShimError) as caught:
            await ipvs(Liar([family(), *answers]), tmp_path).kernel.services()
        assert caught.value.message == "the guest's kernel does not tell its table to the end"
    (state,) = await ipvs(Liar([family(), service + done(), done()]), tmp_path).kernel.services()
    assert state.service == parse_parameters(RULE).service


async def test_an_unreadable_table_to_go_back_to_hinders_changes_but_a_clear_one(tmp_path: Path) -> None:
    (tmp_path / "ipvs-before").write_text('[["none"]]')
    table = ipvs(Liar([family(), acknowledgement(1)]), tmp_path)
    with pytest.raises(ShimError) as caught:
        await table.change(parse_parameters(RULE), limited=True)
    assert caught.value.code == "failed-precondition"
    await table.reconcile()  # says so in the log, and lets the sandbox be taken over
    await table.change(Command(Verb.CLEAR), limited=False)
    assert os.listdir(tmp_path) == []


async def test_a_change_that_cannot_be_taken_back_names_no_rule(tmp_path: Path) -> None:
    (tmp_path / "ipvs-before").write_text("[]")
    table = ipvs(Liar([family(), acknowledgement(1, 1)]), tmp_path)
    with pytest.raises(ShimError) as caught:
        await table.change(parse_parameters(RULE), limited=True)
    assert caught.value.code == "aborted"
    assert caught.value.message.startswith("an earlier change cannot be taken back: ")


async def test_a_table_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShimError) as caught:
        await ipvs(Liar([], lines=2**63), tmp_path).change(parse_parameters(RULE), limited=True)
    assert caught.value.code == "resource-exhausted"


async def test_a_table_that_no_kernel_writes_is_refused(tmp_path: Path) -> None:
    liar = Liar([family(), done()], table=b"a\nb\nc\nTCP  \x1b[2J:00 rr\n")
    with pytest.raises(ShimError) as caught:
        await ipvs(liar, tmp_path).listing(parse_parameters("-L"))
    assert "/proc/net/ip_vs" in caught.value.message
    assert "\x1b" not in caught.value.message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    answers=st.lists(st.binary(max_size=80) | st.just(family()), max_size=5), table=st.binary(max_size=120)
)
async def test_any_answers_end_in_a_result_or_one_error(
    tmp_path: Path, answers: list[bytes], table: bytes
) -> None:
    def told() -> Ipvs:
        return ipvs(Liar([family(), *answers], table), tmp_path)

    with suppress(ShimError):
        await told().change(parse_parameters(RULE), limited=True)
    for text in ("-L", "-L -t 10.0.0.1:80"):
        with suppress(ShimError):
            assert (await told().listing(parse_parameters(text))).endswith("\n")
    with suppress(ShimError):
        assert await told().kernel.delete_flows(parse_cleanup("-d 10.0.0.1 -p tcp")) >= 0
