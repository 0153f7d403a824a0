"""The rules for a sandbox's and for a container's id."""

from __future__ import annotations

import re

from kata_shim.errors import invalid
from kata_shim.quoting import quoted

_CONTAINER_ID = re.compile(r"(?=.{1,76}$)[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_id(id: str) -> str:  # noqa: A002 - "id" is the word of the documents
    """Return `id` unchanged if it is 1-64 of `[A-Za-z0-9_.-]`, and neither `.` nor `..`.

    Raises `invalid-argument` otherwise. An id is the name of the sandbox's directory, hence the last rule.
    """
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise invalid(f"id: {quoted(id)} is not 1-64 of [A-Za-z0-9_.-]")
    if id in (".", ".."):
        raise invalid(f"id: {quoted(id)} is the name of a directory; use another id")
    return id


def check_container_id(text: str) -> str:
    """Return a container's id if it is one by containerd's rule (pkg/identifiers); else raises ShimError."""
    if not _CONTAINER_ID.fullmatch(text):
        raise invalid(f"id: {quoted(text[:100])} is not 1 to 76 of A-Z a-z 0-9, and between these _ . -")
    return text
