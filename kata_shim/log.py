"""One structured log per sandbox, in logfmt as containerd's and Kata's own components write it."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

_ROOT = logging.getLogger("kata_shim")
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.:/+-,@%")


def quote(value: object) -> str:
    """Return `value` as one logfmt token: bare where that is unambiguous, else quoted and escaped."""
    text = str(value)
    if text and _BARE.issuperset(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped) + '"'


class _Logfmt(logging.Formatter):
    def __init__(self, sandbox: str) -> None:
        super().__init__()
        self._sandbox = quote(sandbox)

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = "".join(f" {key}={quote(value)}" for key, value in getattr(record, "fields", {}).items())
        level = record.levelname.lower()
        line = f'time="{stamp}.{int(record.msecs):03d}Z" level={level} sandbox={self._sandbox}'
        line += f" msg={quote(record.getMessage())}{fields}"
        if record.exc_info:
            line += f" error={quote(self.formatException(record.exc_info))}"
        return line


def setup(sandbox: str, *, debug: bool = False, stream: TextIO | None = None) -> None:
    """Send every record of this process to `stream` (stderr), one line each, naming the sandbox."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Logfmt(sandbox))
    for logger in (_ROOT, logging.getLogger("asyncio")):
        logger.handlers[:] = [handler]
        logger.propagate = False
    _ROOT.setLevel(logging.DEBUG if debug else logging.INFO)


def debug(message: str, **fields: object) -> None:
    """Log a detail that only `enable_debug` shows."""
    _ROOT.debug(message, extra={"fields": fields})


def info(message: str, **fields: object) -> None:
    """Log an event of the sandbox's life."""
    _ROOT.info(message, extra={"fields": fields})


def warning(message: str, **fields: object) -> None:
    """Log what the operator should look at although the operation goes on."""
    _ROOT.warning(message, extra={"fields": fields})


def exception(message: str, **fields: object) -> None:
    """Log the exception being handled with its traceback: a defect of ours, never bad input."""
    _ROOT.error(message, exc_info=True, extra={"fields": fields})
