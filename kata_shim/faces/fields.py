"""A request's params, read field by field."""

from __future__ import annotations

from typing import TypeVar

from kata_shim.errors import invalid
from kata_shim.faces.jsonl import Call

_T = TypeVar("_T")
_KINDS: dict[type, str] = {str: "a string", bool: "true or false", list: "an array", dict: "an object"}


def field(call: Call, name: str, kind: type[_T], default: _T) -> _T:
    """Return one of the params, `default` where it is absent or null; raises ShimError."""
    if call.params is None:
        return default
    if not isinstance(call.params, dict):
        raise invalid("params: not an object")
    value = call.params.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise invalid(f"{name}: not {_KINDS[kind]}")
    return value
