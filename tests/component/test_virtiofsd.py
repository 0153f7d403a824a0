"""The real virtiofsd: where it is started, that nobody else can connect, and what is said of its end."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu.process import find_by_log
from kata_shim.qemu.virtiofsd import LOG, Virtiofsd

pytestmark = pytest.mark.quick

DAEMON = "/usr/lib/qemu/virtiofsd"
PATIENCE = 10.0
LOUD = """#!/bin/sh
i=0
while [ $i -lt 40000 ]; do i=$((i+1)); echo $i; done 2>&-
touch "${0%/*}/end"
exit 3
"""  # says 200 KiB


@pytest.mark.parametrize("name", ["plain", "a,b", "a\\b", "a=b c"])
async def test_any_directory_is_served(tmp_path: Path, name: str) -> None:
    shared = tmp_path / name
    shared.mkdir()
    (shared / "file").touch()
    server = Virtiofsd(tmp_path, DAEMON, "auto")
    with server.start(str(shared), tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted([name, LOG])  # and no socket
        while len(find_by_log(tmp_path / LOG)) < 2:
            assert not server.process.exited.done(), server.failure()
        inner = max(pid for pid, _ in find_by_log(tmp_path / LOG))
        while os.listdir(f"/proc/{inner}/root") != ["file"]:
            assert not server.process.exited.done(), server.failure()
    await server.kill(PATIENCE)  # who was connected has hung up
    assert (server.process.exited.result(), server.failure()) == (0, "")
    assert find_by_log(tmp_path / LOG) == []
    server.close()


async def test_its_last_words(tmp_path: Path) -> None:
    server = Virtiofsd(tmp_path, DAEMON, "auto")
    with server.start(str(tmp_path / "nowhere"), tmp_path):
        await server.ended()
    assert server.failure().startswith(f"virtio_fs_daemon: {DAEMON}: exit status 1: ")
    assert server.failure().endswith("No such file or directory")
    server.close()


async def test_one_that_is_mute_is_killed(tmp_path: Path) -> None:
    (tmp_path / "mute").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "mute").chmod(0o755)
    server = Virtiofsd(tmp_path, str(tmp_path / "mute"), "auto")
    server.start(str(tmp_path), tmp_path).close()
    another = Virtiofsd(tmp_path, DAEMON, "auto")
    assert another.attach()
    assert another.process.pid == server.process.pid
    await another.kill(0)
    await server.ended()
    assert not Virtiofsd(tmp_path, DAEMON, "auto").attach()
    server.close()
    another.close()


async def test_what_it_says_fills_nothing(tmp_path: Path) -> None:
    """Nor does it wait for anybody to read it; what it said first is kept."""
    (tmp_path / "loud").write_text(LOUD)
    (tmp_path / "loud").chmod(0o755)
    server = Virtiofsd(tmp_path, str(tmp_path / "loud"), "auto")
    with server.start(str(tmp_path), tmp_path):
        await server.ended()
    assert (tmp_path / "end").exists()
    assert (tmp_path / LOG).stat().st_blocks == 0
    assert re.fullmatch(r"virtio_fs_daemon: .*/loud: exit status 3: \d+", server.failure())
    server.close()


async def test_there_is_no_such_program(tmp_path: Path) -> None:
    server = Virtiofsd(tmp_path, "/no/virtiofsd", "auto")
    with pytest.raises(ShimError, match=r"^virtio_fs_daemon: /no/virtiofsd does not exist or is not"):
        server.start(str(tmp_path), tmp_path)
    assert not os.listdir(tmp_path)
