"""Calls to an agent, as the tests make them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from kata_shim.errors import ShimError
from kata_shim.protos.guest_pb2 import (
    STDERR,
    STDOUT,
    ReadOutputRequest,
    StartCommandRequest,
    Stream,
    WaitCommandRequest,
)
from kata_shim.protos.services import SERVICES
from kata_shim.ttrpc.client import Client

SOON = 20.0  # seconds; far more than anything here takes


async def call(client: Client, method: str, request: Any = None, timeout: float | None = SOON) -> Any:
    """Call the method of that name, of the service that takes such a request where two have it."""
    service, (request_type, response_type) = next(
        (name, methods[method])
        for name, methods in SERVICES.items()
        if method in methods and (request is None or isinstance(request, methods[method][0]))
    )
    return await client.call(service, method, request or request_type(), response_type, timeout)


async def refused(client: Client, method: str, request: Any) -> tuple[str, str]:
    with pytest.raises(ShimError) as error:
        await call(client, method, request)
    return error.value.code, error.value.message


async def start(client: Client, *argv: str, **more: Any) -> int:
    answer = await call(client, "StartCommand", StartCommandRequest(argv=argv, **more))
    return int(answer.command_id)


async def read(client: Client, command: int, stream: Stream) -> bytes:
    """Read a stream of a command to its end."""
    whole = b""
    request = ReadOutputRequest(command_id=command, stream=stream, len=1 << 16)
    while data := (await call(client, "ReadOutput", request)).data:
        whole += data
    return whole


async def finish(client: Client, command: int) -> tuple[int, bytes, bytes]:
    """Return what a command wrote, and its status."""
    stdout, stderr = await asyncio.gather(read(client, command, STDOUT), read(client, command, STDERR))
    answer = await call(client, "WaitCommand", WaitCommandRequest(command_id=command))
    return answer.status, stdout, stderr


async def sh(client: Client, script: str, **more: Any) -> tuple[int, bytes, bytes]:
    return await finish(client, await start(client, "sh", "-c", script, **more))


async def gone(pid: int) -> None:
    """Wait until a process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(SOON):
            await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
