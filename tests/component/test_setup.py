"""scripts/setup: whoever it cannot serve hears why, and nothing is touched."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PROJECT = Path(__file__).resolve().parents[2]


def setup(
    *around: str, options: tuple[str, ...] = (), script: Path = PROJECT / "scripts/setup"
) -> tuple[int, str, str]:
    """Run it within another command; return its status, stdout and stderr."""
    command = [*around, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def within_reach() -> Iterator[Path]:
    """The script where anybody may read it: the checkout may be root's alone."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "scripts/setup"
        copy.parent.mkdir()
        shutil.copy(PROJECT / "scripts/setup", copy)
        Path(directory).chmod(0o711)
        yield copy


def test_not_root(within_reach: Path) -> None:
    unprivileged = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    needs = "setup: needs root, to install packages and the guest image\n"
    assert setup(*unprivileged, script=within_reach) == (1, "", needs)


@pytest.mark.parametrize("release", ["ID=debian\nVERSION_ID=11\n", "ID=fedora\nVERSION_ID=12\n", ""])
def test_another_system(tmp_path: Path, release: str) -> None:
    other = tmp_path / "os-release"
    other.write_text(release)
    script = 'mount --bind "$0" /etc/os-release && exec "$@"'
    elsewhere = ("unshare", "--mount", "sh", "-c", script, str(other))
    assert setup(*elsewhere) == (1, "", "setup: this is not Debian 12\n")


def test_misuse() -> None:
    status, out, err = setup(options=("--bogus",))
    assert (status, out) == (2, "")
    assert err.startswith("./scripts/setup [--tests]: ")
