"""The factory's parts by themselves: no VM is made."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kata_shim.config import load
from kata_shim.errors import ShimError
from kata_shim.factory import cache, daemon, endpoint
from kata_shim.factory.home import Home
from kata_shim.factory.launch import Launch
from kata_shim.qemu.process import KILLED_AT_ONCE, read_start_time, spawn
from tests.factory import configure
from tests.started import PATIENCE

pytestmark = pytest.mark.quick


async def test_an_endpoint_in_a_directory_that_somebody_has_locked(tmp_path: Path) -> None:
    """Whoever may read a directory may lock it: that holds up nobody, and nothing stays beside the socket."""
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        (await endpoint.bind(tmp_path / "cache.sock")).close()
    finally:
        os.close(directory)
    assert os.listdir(tmp_path) == ["cache.sock"]


async def test_an_endpoint_where_another_factory_just_starts(tmp_path: Path) -> None:
    path = tmp_path / "cache.sock"
    with (tmp_path / "cache.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShimError) as refused:
            await endpoint.bind(path)
    why = "another factory starts there just now; set another path"
    assert refused.value.message == f"vm_cache_endpoint: {path}: {why}"
    (await endpoint.bind(path)).close()  # a killed one's lock is none


async def test_what_a_factory_left_that_was_killed_as_it_started(tmp_path: Path) -> None:
    """A lock that nobody holds, be it with a socket or not; but a socket that is about to be served stays."""
    path, lock = tmp_path / "cache.sock", tmp_path / "cache.sock.lock"
    lock.touch()
    endpoint.remove_dead(path)
    assert os.listdir(tmp_path) == []
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            endpoint.remove_dead(path)
            assert sorted(os.listdir(tmp_path)) == ["cache.sock", "cache.sock.lock"]
        endpoint.remove_dead(path)
    assert os.listdir(tmp_path) == []


async def test_destroying_a_factory_that_does_not_tell_who_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, with an error."""
    monkeypatch.setattr(daemon, "DESTROY_TIMEOUT", 0.1)
    home = Home(root / "silent")
    assert home.take()
    with pytest.raises(ShimError) as error:
        await daemon.destroy(home.root)
    why = "its owner (pid unknown) does not end within 0.1 s; end it by hand"
    assert error.value.message == f"{home.path}/lock: {why}"
    await home.clear()
    home.root.rmdir()


async def test_a_defect_while_a_vm_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, and told meanwhile."""
    tries: asyncio.Queue[int] = asyncio.Queue()

    async def fail(*_: object) -> None:
        tries.put_nowait(1)
        raise KeyError("defect")

    monkeypatch.setattr(cache, "BACK_OFF", 0.001)
    monkeypatch.setattr(Launch, "make", fail)
    (tmp_path / "vms").mkdir()
    config, _ = load(configure(tmp_path / "one.toml", tmp_path))
    one = cache.Cache(tmp_path / "vms", config, tmp_path / "accelerator.json")
    one.start()
    async with asyncio.timeout(PATIENCE):
        for _ in range(3):
            await tries.get()
    assert one.trouble == "KeyError: 'defect'"
    await one.close()
    assert os.listdir(tmp_path / "vms") == []


async def test_many_vms_are_ended_with_one_look_at_the_processes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose logs lie in the factory's directory, and no other."""
    home = Home(root / "many")
    assert home.take()
    other = spawn(["/bin/sleep", "600"], root / "many/other.log")
    kept = []
    for number in range(KILLED_AT_ONCE + 1):
        (home.vms / f"vm{number}").mkdir(parents=True)
        kept.append(spawn(["/bin/sleep", "600"], home.vms / f"vm{number}/qemu.log"))
    looks = []

    def look(path: str, real: Callable[[str], list[str]] = os.listdir) -> list[str]:
        looks.append(str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", look)
    assert await home.clear() == len(kept)
    assert looks.count("/proc") == 1
    assert [read_start_time(process.pid) for process in kept] == [0] * len(kept)
    await asyncio.gather(*(process.exited for process in kept))
    assert not other.exited.done()
    await other.kill()
    (root / "many/other.log").unlink()
    home.root.rmdir()


async def test_a_vm_cannot_be_taken_while_it_is_ended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be ended as the taker's, who may have told his caller already that it runs."""
    home = Home(root / "late")
    assert home.take()
    vm = home.vms / "vm"
    vm.mkdir(parents=True)
    process = spawn(["/bin/sleep", "600"], vm / "qemu.log")
    looks = []

    def look(path: str, real: Callable[[str], list[str]] = os.listdir) -> list[str]:
        if path == "/proc":
            looks.append(path)
            with pytest.raises(FileNotFoundError):
                vm.rename(home.root / "taken")
        return real(path)

    monkeypatch.setattr(os, "listdir", look)
    assert await home.clear() == 1
    assert looks
    await process.exited
    home.root.rmdir()


async def test_a_factory_killed_while_it_ends_its_vms(root: Path) -> None:
    """The next ends those that it had, and those that it made before."""
    home = Home(root / "cut")
    assert home.take()
    kept = []
    for directory in (home.path / "ended/vm", home.vms / "vm"):
        directory.mkdir(parents=True)
        kept.append(spawn(["/bin/sleep", "600"], directory / "qemu.log"))
    assert await home.clear() == 2
    for process in kept:
        await process.exited
    home.root.rmdir()


async def test_a_vm_that_somebody_takes_while_it_is_discarded(tmp_path: Path) -> None:
    """It is theirs, and lives; one that nobody takes is ended, and nothing is left of it."""
    config, _ = load(configure(tmp_path / "one.toml", tmp_path))
    one = cache.Cache(tmp_path / "vms", config, tmp_path / "accelerator.json")
    vms = []
    for name in ("taken", "waiting"):
        directory = tmp_path / "vms" / name
        directory.mkdir(parents=True)
        process = spawn(["/bin/sleep", "600"], directory / "qemu.log")
        vms.append(cache.Vm(directory, "", name, process))
    taken, waiting = vms
    taken.directory.rename(tmp_path / "theirs")
    for vm in vms:
        await one._discard(vm)
    assert not taken.process.exited.done()
    assert waiting.process.exited.done()
    assert os.listdir(tmp_path / "vms") == []
    await taken.process.kill()
