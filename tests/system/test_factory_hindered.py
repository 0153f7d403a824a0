"""A factory that starts, or goes on, although something around it is not as it should be."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factory import configure, serving
from tests.started import PATIENCE, kill
from tests.support import Result, Runtime


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[Runtime]:
    """The CLI with a factory that makes no VM, on a root of its own."""
    path = root / "hindered"
    (path / "run").mkdir(0o755, parents=True)
    yield Runtime(path / "root", configure(path / "none.toml", path, 0, clone=False))
    shutil.rmtree(path)


@pytest.fixture
def endpoint(own: Runtime) -> Path:
    """Where the factory serves."""
    return own.root.parent / "run/cache.sock"


def test_a_directory_that_somebody_has_locked(own: Runtime, endpoint: Path) -> None:
    """Any user may do that; the factory starts, and is destroyed."""
    directory = os.open(endpoint.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with serving(own, endpoint) as factory:
            assert own("factory", "destroy") == Result(0, "", "")
            assert factory.process.wait(PATIENCE) == 0
    finally:
        os.close(directory)


def test_sockets_are_the_owners_alone(own: Runtime, endpoint: Path) -> None:
    with serving(own, endpoint) as factory:
        factory.until(lambda status: status["zygote"] > 0)
        modes = [path.stat().st_mode for path in (endpoint, own.root / "factory/zygote.sock")]
    assert modes == [stat.S_IFSOCK | 0o600] * 2


def test_a_zygote_that_cannot_be_started(own: Runtime, endpoint: Path) -> None:
    """There is one as soon as it can be."""
    place = own.root / "factory/zygote.sock"
    with serving(own, endpoint) as factory:
        zygote = factory.until(lambda status: status["zygote"] > 0)["zygote"]
        place.unlink()
        place.mkdir()
        kill(zygote)
        assert factory.process.stderr is not None
        for line in factory.process.stderr:
            if "no zygote can be started" in line:
                break
        place.rmdir()
        factory.until(lambda status: status["zygote"] not in (0, zygote))
        assert place.is_socket()
