"""The JSON lines between our own processes on the host: what a server reads and what it writes. No I/O.

A line is one JSON object in UTF-8 and a newline, at most MAX_LINE bytes with it. A client writes

    {"id":1,"method":"kata-network.add-iface","params":{…}}   a request; params may be any JSON, or absent
    {"id":1,"cancel":true}                                    gives request 1 up
    {"id":1,"stdin":"<base64>"}   {"id":1,"stdin":null}       feeds the command's stdin; closes it
    {"id":1,"resize":[24,80]}                                 sets the rows and columns of its terminal

and the server answers, in any order between requests,

    {"id":1,"progress":…}                                     any number of times, before the end
    {"id":1,"result":…}   {"id":1,"error":{"code":…,"message":…}}     exactly one, the end
    {"id":1,"warnings":["…"],"result":…}                      the end, with something to say beside it

What a server writes is compact, `id` is the first key and `progress`, `result` or `error` the last
one. So the bytes between `{"id":1,"result":` and the final `}` are the result and nothing else: a client
prints them as they are, without parsing them.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from kata_shim.errors import ShimError

MAX_LINE = 4 * 1024 * 1024
MAX_ID = 128
MAX_MESSAGE = 16 * 1024
MAX_SIZE = 65535  # of a terminal: struct winsize has 16 bits for each
_KINDS = {dict: "an object", list: "an array", str: "a string", int: "an integer", float: "a number"}


class LineError(ShimError):
    """A line outside this protocol (`invalid-argument`); `request_id` is None if it had none to read."""

    def __init__(self, request_id: int | str | None, message: str) -> None:
        super().__init__("invalid-argument", message)
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class Request:
    """A call: `method` is a name of the protocol, `params` any JSON value, not checked yet."""

    id: int | str
    method: str
    params: object


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of request `id` no longer wants it; a request that has ended already is no error."""

    id: int | str


@dataclass(frozen=True, slots=True)
class Stdin:
    """Bytes for the stdin of the command that request `id` runs; None closes it."""

    id: int | str
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Resize:
    """The terminal of the command that request `id` runs has so many rows and columns now."""

    id: int | str
    rows: int
    columns: int


def parse(line: bytes) -> Request | Cancel | Stdin | Resize:
    """Return what one line of a client says.

    Raises LineError, and nothing else whatever the bytes. Keys that do not belong to the kind of line are
    refused, so that a misspelt one is not silently without effect.
    """
    if len(line) > MAX_LINE:
        raise LineError(None, f"line: {len(line)} bytes are more than {MAX_LINE}")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineError(None, f"line: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineError(None, f"line: {_kind(value)} is not an object")
    request_id = _read_id(value)
    kinds = [key for key in ("method", "cancel", "stdin", "resize") if key in value]
    if len(kinds) != 1:
        raise LineError(request_id, "line: exactly one of method, cancel, stdin and resize is needed")
    known = {"id", "params", "method"} if kinds[0] == "method" else {"id", kinds[0]}
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise LineError(request_id, f"{unknown[:64]!a}: unknown key beside {kinds[0]}")
    if kinds[0] == "method":
        return _read_request(request_id, value)
    if kinds[0] == "cancel":
        if value["cancel"] is not True:
            raise LineError(request_id, f"cancel: {_kind(value['cancel'])} is not true")
        return Cancel(request_id)
    if kinds[0] == "resize":
        return Resize(request_id, *_read_size(request_id, value["resize"]))
    return Stdin(request_id, _read_stdin(request_id, value["stdin"]))


def result(request_id: int | str, value: object, warnings: Sequence[str] = ()) -> bytes:
    """Return the line that ends a request well.

    Raises ShimError: `resource-exhausted` for a line over MAX_LINE, `internal` for what JSON cannot carry;
    the server then ends the request with `failure`.
    """
    return _write(request_id, "result", value, warnings)


def progress(request_id: int | str, value: object) -> bytes:
    """Return the line of one step of a request that has not ended. Raises ShimError as `result` does."""
    return _write(request_id, "progress", value, ())


def failure(request_id: int | str | None, error: ShimError, warnings: Sequence[str] = ()) -> bytes:
    """Return the line that ends a request badly. Never raises: what does not fit or encode is left out.

    `request_id` is None for a line whose id could not be read.
    """
    # A message may quote a file name or a process's output, decoded with surrogateescape.
    message = error.message[:MAX_MESSAGE].encode("utf-8", "backslashreplace").decode()
    try:
        return _write(request_id, "error", {**error.to_json(), "message": message}, warnings)
    except ShimError:
        return _write(request_id, "error", {"code": error.code, "message": message}, ())


def _write(request_id: int | str | None, key: str, value: object, warnings: Sequence[str]) -> bytes:
    answer: dict[str, object] = {"id": request_id}
    if warnings:
        answer["warnings"] = list(warnings)
    answer[key] = value
    try:
        line = orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        raise ShimError("internal", f"{key}: cannot be written as JSON: {error}") from None
    if len(line) > MAX_LINE:
        raise ShimError(
            "resource-exhausted", f"{key}: {len(line)} bytes are more than the {MAX_LINE} of a line"
        )
    return line


def _read_id(value: dict[str, object]) -> int | str:
    request_id = value.get("id")
    if isinstance(request_id, str):
        if len(request_id) > MAX_ID:
            raise LineError(None, f"id: {len(request_id)} characters are more than {MAX_ID}")
        return request_id
    if isinstance(request_id, int) and not isinstance(request_id, bool):
        return request_id
    raise LineError(None, f"id: {_kind(request_id)} is not an integer or a string")


def _read_request(request_id: int | str, value: dict[str, object]) -> Request:
    method = value["method"]
    if not isinstance(method, str):
        raise LineError(request_id, f"method: {_kind(method)} is not a string")
    return Request(request_id, method, value.get("params"))


def _read_stdin(request_id: int | str, text: object) -> bytes | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise LineError(request_id, f"stdin: {_kind(text)} is not a string or null")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise LineError(request_id, f"stdin: not base64: {error}") from None


def _read_size(request_id: int | str, size: object) -> tuple[int, int]:
    if isinstance(size, list) and len(size) == 2 and all(type(one) is int for one in size):
        rows, columns = size
        if 0 <= rows <= MAX_SIZE and 0 <= columns <= MAX_SIZE:
            return rows, columns
    raise LineError(request_id, f"resize: not [rows, columns], each within 0..{MAX_SIZE}")


def _kind(value: object) -> str:
    """Name a value's JSON type; the value itself may be anything of any size, so it is not repeated."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _KINDS[type(value)]
