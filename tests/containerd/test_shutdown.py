"""The end of a sandbox of containerd's, call by call: its last container is deleted, its shim shut down."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kata_shim.containerd import status_pb2
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import Caller, call
from tests.started import PATIENCE
from tests.support import shipped

POD = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pod"}
WRITTEN = 8 << 20  # bytes


@pytest.fixture
def caller(root: Path, tmp_path: Path) -> Caller:
    return Caller(tmp_path, root, shipped(root, accelerator="tcg"))


@asynccontextmanager
async def started(caller: Caller, rootfs: Path, *args: str) -> AsyncIterator[Client]:
    """A connection to a shim whose sandbox's own container was started."""
    bundle = caller.bundle("pod", str(rootfs), *args, annotations=POD)
    with caller.started("pod", bundle) as path:
        async with await Client.connect(path) as client:
            await call(client, "Create", id="pod", bundle=str(bundle))
            await call(client, "Start", id="pod")
            yield client


def taken(path: Path) -> int:
    """Remove a file; return its size."""
    size = path.stat().st_size
    path.unlink()
    return size


def left(caller: Caller, pid: int) -> list[Path]:
    """What there is of a sandbox."""
    places = (Path(f"/proc/{pid}"), caller.root / "sandboxes/pod", caller.socket("pod"))
    return [path for path in places if os.path.lexists(path)]


async def test_the_last_containers_end(caller: Caller, rootfs: Path) -> None:
    script = f"dd if=/dev/zero of=/tmp/written bs=64k count={WRITTEN >> 16}; exit 7"
    async with started(caller, rootfs, "/bin/sh", "-c", script) as client:
        assert (await call(client, "Wait", id="pod")).exit_status == 7
        deleted = await call(client, "Delete", id="pod")
        assert deleted.exit_status == 7
        assert taken(rootfs / "tmp/written") == WRITTEN
        # It is answered, and then nothing is left, though nobody has called `delete`.
        await call(client, "Shutdown", id="pod")
        async with asyncio.timeout(PATIENCE):
            await client.wait_closed()
        assert left(caller, deleted.pid) == []


async def test_a_sandbox_that_goes_on(caller: Caller, rootfs: Path) -> None:
    """Its container was the last, but instead of Shutdown comes another of the same id."""
    async with started(caller, rootfs, "/bin/true") as client:
        for code in (3, 4):
            await call(client, "Wait", id="pod")
            await call(client, "Delete", id="pod")
            command = ("/bin/sh", "-c", f"exit {code}")
            bundle = caller.bundle(f"again-{code}", str(rootfs), *command, annotations=POD)
            await call(client, "Create", id="pod", bundle=str(bundle))
            await call(client, "Start", id="pod")
            assert (await call(client, "Wait", id="pod")).exit_status == code


async def test_another_container_stays(caller: Caller, rootfs: Path) -> None:
    async with started(caller, rootfs, "/bin/sleep", "1000") as client:
        linux = {"namespaces": [{"type": "pid"}]}
        bundle = caller.bundle("c", str(rootfs), "/bin/sleep", "1000", linux=linux)
        await call(client, "Create", id="c", bundle=str(bundle))
        await call(client, "Start", id="c")
        for name in ("pod", "c"):
            assert (await call(client, "State", id=name)).status == status_pb2.RUNNING
            await call(client, "Kill", id=name, signal=9)
            assert (await call(client, "Wait", id=name)).exit_status == 137
            await call(client, "Delete", id=name)
            if name == "pod":
                await call(client, "Shutdown", id=name)
