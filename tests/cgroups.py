"""Control groups of a test's own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def cgroups(directory: Path) -> Iterator[list[Path]]:
    """Make a cgroup of version 2, and where the host has one a hierarchy of version 1, one in it too."""
    mounted = {"unified": ("cgroup2", "rw")}
    if re.search(r":freezer:", Path("/proc/self/cgroup").read_text()):
        mounted["freezer"] = ("cgroup", "freezer")
    made = []
    for name, (kind, options) in mounted.items():
        (directory / name).mkdir()
        subprocess.run(["mount", "-t", kind, "-o", options, "none", directory / name], check=True)
        made.append(directory / name / f"kata-test-{os.getpid()}")
        made[-1].mkdir()
    try:
        yield made
    finally:
        for group in made:
            group.rmdir()
            subprocess.run(["umount", group.parent], check=True)
