"""kata-runtime's first lines: an interrupt that comes while the rest is imported is no traceback either."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

INTERRUPTED = 130  # the exit status: 128 + SIGINT


def main() -> NoReturn:
    """Run the command line of this process and end it."""
    try:
        from kata_shim.cli.main import main as run

        run()
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
