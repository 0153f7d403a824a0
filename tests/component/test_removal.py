"""Removing a directory of ours: all of it, and nothing that is only mounted there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_shim import mounts
from kata_shim.removal import remove_tree

pytestmark = pytest.mark.quick

DEPTH = 3000  # more than a process may open files, or Python may call itself


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    directory = tmp_path / "ours"
    (directory / "shared/c/rootfs").mkdir(parents=True)
    (directory / "shared/c/1").touch()
    return directory


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    directory = tmp_path / "theirs"
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/marker").write_text("theirs")
    (directory / "empty").touch()
    return directory


def test_all_of_it(ours: Path, theirs: Path) -> None:
    (ours / "link").symlink_to(theirs)
    (ours / "shared/link").symlink_to(theirs)
    os.mkfifo(ours / "shared/c/fifo")
    remove_tree(str(ours))
    assert not ours.exists()
    assert whole(theirs)
    remove_tree(str(ours))


@pytest.fixture(params=["directory", "file"])
def mounted(request: pytest.FixtureRequest, ours: Path, theirs: Path) -> Iterator[Path]:
    """A bind mount, of which neither the device nor the kind of file system tells."""
    source, target = (theirs, "rootfs") if request.param == "directory" else (theirs / "etc/marker", "1")
    point = ours / "shared/c" / target
    mounts.mount(str(source), str(point), "", ("rbind",))
    yield point
    mounts.unmount(str(point))


def test_what_is_mounted_stays(mounted: Path, ours: Path, theirs: Path) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the number is compared
        remove_tree(str(ours))
    assert raised.value.errno == errno.EBUSY
    assert whole(theirs)
    assert mounts.below(str(ours))
    for point in mounts.below(str(ours)):
        mounts.unmount(point)
    remove_tree(str(ours))
    assert not ours.exists()
    assert whole(theirs)


def test_deeper_than_python_goes(ours: Path) -> None:
    at = os.open(ours, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    remove_tree(str(ours))
    assert not ours.exists()


def test_a_link_is_not_a_directory_of_ours(tmp_path: Path, theirs: Path) -> None:
    (tmp_path / "ours").symlink_to(theirs)
    with pytest.raises(OSError, match="Not a directory"):
        remove_tree(str(tmp_path / "ours"))
    assert whole(theirs)


def whole(theirs: Path) -> bool:
    return (theirs / "etc/marker").read_text() == "theirs" and (theirs / "empty").exists()
