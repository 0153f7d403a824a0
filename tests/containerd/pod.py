"""A shim that serves a pod, by hand: what may be done to it then is what a test adds to `Shim`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kata_shim.errors import ShimError
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import Caller, call


@contextmanager
def pod(directory: Path, root: Path, config: Path, rootfs: Path) -> Iterator[Caller]:
    """Start a shim and the pod `pod` there, whose own container sleeps."""
    caller = Caller(directory, root, config)
    annotations = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pod"}
    bundle = caller.bundle("pod", str(rootfs), "/bin/sleep", "1000", annotations=annotations)
    with caller.started("pod", bundle) as path:

        async def begin() -> None:
            async with await Client.connect(path) as client:
                await call(client, "Create", id="pod", bundle=str(bundle))
                await call(client, "Start", id="pod")

        asyncio.run(begin())
        yield caller


@dataclass
class Shim:
    """A connection to the shim of it."""

    caller: Caller
    client: Client

    async def __call__(self, name: str, **fields: Any) -> Any:
        """Call a method."""
        return await call(self.client, name, **fields)

    async def fails(self, name: str, **fields: Any) -> tuple[str, str]:
        """Call a method that must fail; return its code and message."""
        with pytest.raises(ShimError) as error:
            await self(name, **fields)
        return error.value.code, error.value.message
