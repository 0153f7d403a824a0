"""A caller of a zygote in a process of its own: `python zygote_caller.py ROOT ID…`, one step a line of stdin.

Each step has the shim of the next id started as client.py does it, and prints "ready" when that shim answers.
The environment's PATIENCE is for how many seconds it waits for the zygote.
"""

from __future__ import annotations

import os
import sys

from kata_shim import shims, spawn


def main() -> None:
    """Start one shim after the other, as told."""
    root, *ids = sys.argv[1:]
    spawn.ZYGOTE_TIMEOUT = float(os.environ.get("PATIENCE", spawn.ZYGOTE_TIMEOUT))
    for sandbox_id in ids:
        sys.stdin.readline()
        shims.connect(root, sandbox_id).call("shim.ping")
        print("ready", flush=True)


if __name__ == "__main__":
    main()
