"""The OCI specification: from the protocol's messages to config.json, as the guest's runtime reads it."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

# Where 0 is a value. Elsewhere proto3 has no other way to say that there is none.
_ZERO_COUNTS = frozenset({"POSIXRlimit", "LinuxSeccompArg", "LinuxIDMapping", "User"})


def to_json(message: Message) -> dict[str, Any]:
    """Return a message of oci.proto as config.json has it; what is not set is left out."""
    every = message.DESCRIPTOR.name in _ZERO_COUNTS
    names = [field.name for field in message.DESCRIPTOR.fields] if every else _set(message)
    return {name: _value(getattr(message, name)) for name in names}


def _set(message: Message) -> list[str]:
    return [field.name for field, _ in message.ListFields()]


def _value(value: Any) -> Any:
    if isinstance(value, str | int):
        return value
    if isinstance(value, Message):
        return to_json(value)
    if hasattr(value, "items"):
        return dict(value)
    return [_value(one) for one in value]
