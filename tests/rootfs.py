"""A root file system for containers: busybox under all its names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def make_rootfs(path: Path) -> Path:
    """Make it at `path`; return that."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root"):
        (path / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", path / "bin")
    names = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout
    for name in names.split():
        if name != "busybox":
            os.symlink("busybox", path / "bin" / name)
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return path


def add_program(rootfs: Path, name: str) -> None:
    """Add one of the host's programs, with the libraries it needs."""
    program = shutil.which(name)
    assert program is not None
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    for file in (program, *(word for word in listed.split() if word.startswith("/"))):
        (rootfs / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, rootfs / file[1:])
