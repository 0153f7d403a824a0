"""The serial link: data is carried whole, and a reset is found at any place of any stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ttrpc.link import NONCE_LENGTH, Event, Lost, Reset, SerialLink, escape, reset

pytestmark = pytest.mark.quick

OLD, NEW = "0f" * 16, "a5" * 16

# Bytes that mean something to the link far more often than chance would have them.
noise = st.lists(
    st.sampled_from([b"\x7e", b"\x7d", b"\x5d", b"\x5e", b"0", OLD.encode(), reset(OLD), b"\x00", b"~}"]),
    max_size=12,
).map(b"".join)
streams = st.one_of(noise, st.binary(max_size=100))


def joined(events: list[Event]) -> list[Event]:
    """Return the events with data that follows data made one."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += event
        else:
            result.append(event)
    return result


def read(link: SerialLink, data: bytes, size: int) -> list[Event]:
    events: list[Event] = []
    for start in range(0, len(data), size):
        events += link.receive(data[start : start + size])
        assert len(link._held) <= NONCE_LENGTH
    return joined(events)


@given(streams, streams, st.integers(1, 40))
def test_a_reset_is_found_after_anything(before: bytes, data: bytes, size: int) -> None:
    link = SerialLink()
    read(link, before, size)
    events = read(link, reset(NEW) + escape(data), size)
    assert events[-2 if data else -1 :] == ([Reset(NEW), data] if data else [Reset(NEW)])


def test_a_stream_cut_anywhere_is_resynchronised() -> None:
    conversation = reset(OLD) + escape(b"\x7e\x7d\x5e before") + reset(OLD) + escape(OLD.encode())
    for cut in range(len(conversation) + 1):
        link = SerialLink()
        read(link, conversation[:cut], 7)
        assert read(link, reset(NEW) + escape(b"after"), 5)[-2:] == [Reset(NEW), b"after"], cut


@given(streams, st.integers(1, 40))
def test_how_it_is_cut_makes_no_difference(data: bytes, size: int) -> None:
    whole = reset(OLD) + data
    assert read(SerialLink(), whole, size) == read(SerialLink(), whole, len(whole))


@given(streams)
def test_data_never_holds_a_flag(data: bytes) -> None:
    assert b"\x7e" not in escape(data)


def test_nothing_is_data_before_the_first_reset() -> None:
    link = SerialLink()
    assert link.receive(escape(b"the middle of something") + reset(OLD)[:-1]) == []
    assert link.receive(b"\x7e" + escape(b"data")) == [Reset(OLD), b"data"]


def test_a_bad_escape_ends_the_data_until_the_next_reset() -> None:
    link = SerialLink()
    events = link.receive(reset(OLD) + b"ab\x7dxcd" + reset(NEW) + b"ef")
    assert events == [Reset(OLD), b"ab", Lost("an escape that stands for nothing"), Reset(NEW), b"ef"]


@pytest.mark.parametrize("nonce", ["", "0f" * 15, "0f" * 17, "0F" * 16, "0g" * 16])
def test_what_is_not_a_nonce_is_no_reset(nonce: str) -> None:
    link = SerialLink()
    assert link.receive(b"\x7e\x7e" + nonce.encode() + b"\x7e" + b"data") == []
