"""The rule for a sandbox's id."""

from __future__ import annotations

import re

from kata_shim.errors import invalid
from kata_shim.quoting import quoted

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
