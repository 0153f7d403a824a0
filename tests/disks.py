"""Disks for containers: images of file systems, loop devices made of them, and a look into either."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


def make_image(path: Path, content: Path, size: int = 64 * MIB) -> Path:
    """Make an ext4 with a directory's content; return `path`."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-d", content, path], check=True)
    return path


@contextmanager
def loop_device(image: Path, *flags: str) -> Iterator[str]:
    """Show a file as a block device, which in the end must be nobody's."""
    shown = subprocess.run(
        ["losetup", *flags, "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        yield shown
        assert is_free(shown), f"{shown} is still in use"
    finally:
        subprocess.run(["losetup", "--detach", shown], check=True)


def is_free(device: str) -> bool:
    """Whether nobody has a block device: neither the host, mounted, nor a QEMU."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return False
    return True


def read(device: str | Path, path: str) -> str:
    """Return what a file of an ext4 says, without mounting it."""
    done = subprocess.run(
        ["debugfs", "-R", f"cat {path}", device], check=True, capture_output=True, text=True
    )
    return done.stdout


def is_clean(device: str | Path) -> bool:
    """Whether an ext4 was unmounted, and is whole."""
    return subprocess.run(["e2fsck", "-n", "-f", device], capture_output=True).returncode == 0


def descriptors(pid: int, device: str | Path) -> list[int]:
    """Return the flags of a process's descriptors of a block device or file."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.realpath(link) == os.path.realpath(device):
            lines = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().splitlines()
            found.append(int(lines[1].split()[1], 8))
    return found
