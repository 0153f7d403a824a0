"""messages.py: whatever the bytes, a message or a clear refusal; for any answer, a line the CLI can cut."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim import messages
from kata_shim.errors import ShimError
from kata_shim.messages import MAX_LINE, Cancel, LineError, Request, Stdin

pytestmark = pytest.mark.quick

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.integers(-(2**63), 2**63 - 1) | texts
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def encode(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


@given(ids, texts, values)
def test_request_is_read_back(request_id: int | str, method: str, params: Any) -> None:
    line = encode({"id": request_id, "method": method, "params": params})
    assert messages.parse(line) == Request(request_id, method, params)


def test_params_may_be_absent() -> None:
    assert messages.parse(b'{"id":1,"method":"sandbox.state"}\n') == Request(1, "sandbox.state", None)


@given(ids)
def test_cancel_is_read_back(request_id: int | str) -> None:
    assert messages.parse(encode({"id": request_id, "cancel": True})) == Cancel(request_id)


@given(ids, st.binary(max_size=100))
def test_stdin_is_read_back(request_id: int | str, data: bytes) -> None:
    line = encode({"id": request_id, "stdin": base64.b64encode(data).decode()})
    assert messages.parse(line) == Stdin(request_id, data)


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (0, 0), (65535, 65535)])
def test_size_of_a_terminal(rows: int, columns: int) -> None:
    line = encode({"id": 1, "resize": [rows, columns]})
    assert messages.parse(line) == messages.Resize(1, rows, columns)


@pytest.mark.parametrize(
    "size", [None, [], [24], [24, 80, 1], [24, -1], [65536, 1], [24.0, 80], [True, 1], "24x80", {"rows": 1}]
)
def test_size_that_is_none(size: object) -> None:
    with pytest.raises(messages.LineError, match=r"resize: not \[rows, columns\], each within 0\.\.65535"):
        messages.parse(encode({"id": 1, "resize": size}))


def test_null_closes_stdin() -> None:
    assert messages.parse(b'{"id":"a","stdin":null}') == Stdin("a", None)


@pytest.mark.parametrize(
    ("line", "request_id", "message"),
    [
        (b"", None, "line: not JSON: "),
        (b"\n", None, "line: not JSON: "),
        (b"{", None, "line: not JSON: "),
        (b'{"id":1}{"id":2}', None, "line: not JSON: "),
        (b'{"id":1,"method":"\xff"}', None, "line: not JSON: "),
        (b'{"id":1,"method":"x","params":NaN}', None, "line: not JSON: "),
        (b"[" * 100_000, None, "line: not JSON: "),
        (b"1", None, "line: an integer is not an object"),
        (b"[]", None, "line: an array is not an object"),
        (b"null", None, "line: null is not an object"),
        (b"{}", None, "id: null is not an integer or a string"),
        (b'{"id":true,"method":"x"}', None, "id: true is not an integer or a string"),
        (b'{"id":1.5,"method":"x"}', None, "id: a number is not an integer or a string"),
        (b'{"id":1e99,"method":"x"}', None, "id: a number is not an integer or a string"),
        (b'{"id":[],"method":"x"}', None, "id: an array is not an integer or a string"),
        (b'{"id":"%s","method":"x"}' % (b"i" * 129), None, "id: 129 characters are more than 128"),
        (b'{"id":1}', 1, "line: exactly one of method, cancel, stdin and resize is needed"),
        (
            b'{"id":1,"method":"x","cancel":true}',
            1,
            "line: exactly one of method, cancel, stdin and resize is needed",
        ),
        (b'{"id":1,"method":null}', 1, "method: null is not a string"),
        (b'{"id":1,"method":"x","parms":1}', 1, "'parms': unknown key beside method"),
        (b'{"id":1,"cancel":true,"params":1}', 1, "'params': unknown key beside cancel"),
        (b'{"id":1,"cancel":false}', 1, "cancel: false is not true"),
        (b'{"id":1,"cancel":1}', 1, "cancel: an integer is not true"),
        (b'{"id":"a","stdin":7}', "a", "stdin: an integer is not a string or null"),
        (b'{"id":1,"stdin":"YQ"}', 1, "stdin: not base64: "),
        (b'{"id":1,"stdin":"Y Q=="}', 1, "stdin: not base64: "),
        (b'{"id":1,"stdin":"\xc3\xa9"}', 1, "stdin: not base64: "),
    ],
)
def test_refused(line: bytes, request_id: int | str | None, message: str) -> None:
    with pytest.raises(LineError) as raised:
        messages.parse(line)
    assert raised.value.request_id == request_id
    assert raised.value.code == "invalid-argument"
    assert raised.value.message.startswith(message)


def test_longest_line() -> None:
    frame = len(b'{"id":1,"method":"x","params":""}\n')
    longest = b'{"id":1,"method":"x","params":"%s"}\n' % (b"p" * (MAX_LINE - frame))
    assert isinstance(messages.parse(longest), Request)
    with pytest.raises(LineError, match="are more than 4194304"):
        messages.parse(longest + b"\n")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_refusal(line: bytes) -> None:
    with suppress(LineError):
        assert isinstance(messages.parse(line), Request | Cancel | Stdin)


@given(values)
def test_any_json_is_a_message_or_a_refusal(value: Any) -> None:
    with suppress(LineError):
        assert isinstance(messages.parse(encode(value)), Request | Cancel | Stdin)


@given(st.integers(0, 2**31), values)
def test_result_can_be_cut_out_of_its_line(request_id: int, value: Any) -> None:
    line = messages.result(request_id, value)
    prefix = b'{"id":%d,"result":' % request_id
    assert line.startswith(prefix)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert json.loads(line[len(prefix) : -2]) == value


@given(ids, values, st.lists(texts, min_size=1, max_size=3))
def test_warnings_stand_before_the_result(request_id: int | str, value: Any, warnings: list[str]) -> None:
    answer = json.loads(messages.result(request_id, value, warnings))
    assert list(answer) == ["id", "warnings", "result"]
    assert answer == {"id": request_id, "warnings": warnings, "result": value}


def test_answers_byte_for_byte() -> None:
    error = ShimError("not-found", "no such NIC", result={"name": "eth0"})
    assert messages.result(1, None) == b'{"id":1,"result":null}\n'
    assert messages.progress("a", {"step": "boot"}) == b'{"id":"a","progress":{"step":"boot"}}\n'
    assert messages.failure(None, ShimError("internal", "x")) == (
        b'{"id":null,"error":{"code":"internal","message":"x"}}\n'
    )
    assert messages.failure(1, error, ["w"]) == (
        b'{"id":1,"warnings":["w"],'
        b'"error":{"code":"not-found","message":"no such NIC","result":{"name":"eth0"}}}\n'
    )


def test_result_over_a_line_is_an_error() -> None:
    with pytest.raises(
        ShimError, match="result: 4194326 bytes are more than the 4194304 of a line"
    ) as raised:
        messages.result(1, "x" * (MAX_LINE + 1))
    assert raised.value.code == "resource-exhausted"


@pytest.mark.parametrize("value", [object(), "\udc80", 2**70])
def test_result_that_is_no_json_is_an_error(value: object) -> None:
    with pytest.raises(ShimError, match="result: cannot be written as JSON: ") as raised:
        messages.result(1, value)
    assert raised.value.code == "internal"


def test_failure_never_raises() -> None:
    assert b'"message":"\\\\udc80"' in messages.failure(1, ShimError("internal", "\udc80"))
    assert messages.failure(1, ShimError("internal", "m", result="x" * MAX_LINE)) == (
        b'{"id":1,"error":{"code":"internal","message":"m"}}\n'
    )
    assert messages.failure(1, ShimError("internal", "m", result=object())) == (
        b'{"id":1,"error":{"code":"internal","message":"m"}}\n'
    )
    assert len(messages.failure(1, ShimError("internal", "\udc80" * MAX_LINE))) < MAX_LINE
