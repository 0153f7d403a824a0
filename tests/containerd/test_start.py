"""The shim's program as containerd calls it, and as anybody else may; no guest is booted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue

from kata_shim import __version__
from kata_shim.errors import ShimError
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import SERVICE, SHIM, Caller, call
from tests.started import PATIENCE, resident
from tests.support import Result, shipped

pytestmark = pytest.mark.quick

MOST = 4 << 20  # bytes of a frame's payload
HEADER = struct.Struct(">IIBB")
NOBODY = 65534


@pytest.fixture
def caller(tmp_path: Path, root: Path) -> Caller:
    return Caller(tmp_path, root, shipped(root, accelerator="tcg"))


@pytest.fixture
async def listening(caller: Caller) -> AsyncIterator[Path]:
    """The socket of a shim."""
    with caller.started("c", caller.bundle("c")) as path:
        yield path


# Ids


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\nb", "é", "x" * 65, "a b", "$(id)"])
def test_start_takes_no_such_id(caller: Caller, name: str) -> None:
    done = caller.start(name, caller.bundle("bundle"))
    assert (done.status, done.stdout) == (1, "")
    assert "is not 1 to 64 of" in done.stderr
    assert not os.path.lexists(caller.socket(name))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "nobody", "x" * 200])
def test_delete_of_what_is_not_there(caller: Caller, name: str) -> None:
    (caller.root / "sandboxes").mkdir(exist_ok=True)
    (caller.root / "sandboxes/marker").touch()
    bundle = caller.bundle("bundle")
    caller.delete(name, bundle)
    caller.delete(name, bundle)
    (caller.root / "sandboxes/marker").unlink()


def test_delete_without_a_bundle(caller: Caller) -> None:
    bundle = caller.bundle("c")
    assert caller.start("c", bundle).status == 0
    (bundle / "config.json").unlink()
    caller.delete("c", bundle)
    assert not os.path.lexists(caller.socket("c"))


def test_an_id_that_is_in_use(caller: Caller, listening: Path) -> None:
    again = caller.start("c", caller.directory / "c")
    assert (again.status, again.stdout) == (1, "")
    assert "c is in use" in again.stderr
    assert listening.is_socket()


# Bundles


def fifo(path: Path) -> None:
    os.mkfifo(path)


def large(path: Path) -> None:
    path.write_text(json.dumps({"annotations": {"x": "y" * (5 << 20)}}))


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def listed(path: Path) -> None:
    path.write_text("[]")


def of_a_pod(path: Path) -> None:
    """A link to a file that names another sandbox."""
    kinds = {"container-type": "container", "sandbox-id": "other"}
    other = path.with_name("other.json")
    other.write_text(json.dumps({"annotations": {f"io.kubernetes.cri.{k}": v for k, v in kinds.items()}}))
    path.symlink_to(other)


def binary(path: Path) -> None:
    path.write_bytes(b"\xff\0\xfe")


@pytest.mark.parametrize("make", [fifo, Path.mkdir, large, nested, listed, of_a_pod, binary])
def test_a_config_that_is_none_hinders_neither_start_nor_delete(
    caller: Caller, make: Callable[[Path], None]
) -> None:
    bundle = caller.bundle("c")
    (bundle / "config.json").unlink()
    make(bundle / "config.json")
    with caller.started("c", bundle):
        pass


def test_a_container_of_a_pod_that_is_not_there(caller: Caller) -> None:
    kinds = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "../pod"}
    bundle = caller.bundle("c", annotations=kinds)
    done = caller.start("c", bundle)
    assert (done.status, done.stdout) == (1, "")
    assert "no shim of it is running" in done.stderr
    caller.delete("c", bundle)


# What containerd says, and what it hears


def test_address(caller: Caller) -> None:
    bundle = caller.bundle("c")
    with caller.started("c", bundle) as path:
        assert (bundle / "address").read_text() == f"unix://{path}"


def test_bootstrap_parameters_are_answered_in_json(caller: Caller) -> None:
    bundle = caller.bundle("c")
    done = caller.start("c", bundle, stdin=b"\x0a\x01c\x12\x07hostile")
    assert json.loads(done.stdout) == {
        "version": 3,
        "address": f"unix://{caller.socket('c')}",
        "protocol": "ttrpc",
    }
    caller.delete("c", bundle)


@pytest.mark.parametrize(
    "stdin", [b"\x0a\x01d", b"\x0a", b"\x0a\xff\xff\xff", b"\x0a\x00", b"\xff" * 100_000]
)
def test_other_options_are_not(caller: Caller, stdin: bytes) -> None:
    bundle = caller.bundle("c")
    assert caller.start("c", bundle, stdin) == Result(0, f"unix://{caller.socket('c')}", "")
    caller.delete("c", bundle)


def test_start_without_stdin_and_without_an_address_of_events(caller: Caller) -> None:
    bundle = caller.bundle("c")
    environment = {name: value for name, value in caller.environment.items() if name != "TTRPC_ADDRESS"}
    started = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *caller.flags("c"), "start"],
        cwd=bundle,
        env=environment,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert started.stdout.decode() == f"unix://{caller.socket('c')}"
    caller.delete("c", bundle)


def test_info() -> None:
    done = subprocess.run([SHIM, "-info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    version = __version__.encode()
    inner = bytes([0x0A, len(version)]) + version
    name = b"io.containerd.kata.v2"
    assert done.stdout == bytes([0x0A, len(name)]) + name + bytes([0x12, len(inner)]) + inner
    assert (done.returncode, done.stderr) == (0, b"")


# Who may call, and how


def test_cve_2020_15257_no_socket_is_abstract_or_anybody_elses(listening: Path) -> None:
    assert stat.S_IMODE(listening.stat().st_mode) == 0o600
    assert listening.stat().st_uid == 0
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    assert str(listening) in names
    assert not [name for name in names if name.startswith("@")]


async def test_cve_2020_15257_another_user_is_hung_up_on(listening: Path) -> None:
    """Even where the path's mode does not hinder it."""
    os.chmod(listening, 0o666)  # noqa: S103
    child = await asyncio.create_subprocess_exec(
        *("setpriv", f"--reuid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-c"),
        f"import socket; s = socket.socket(1); s.connect({listening.name!r}); print(s.recv(1))",
        stdout=asyncio.subprocess.PIPE,
        cwd=listening.parent,
    )
    said, _ = await child.communicate()
    assert said == b"b''\n"
    async with await Client.connect(listening) as client:
        assert (await call(client, "Connect")).shim_pid


@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(MOST + 1, 1, 1, 0),
        HEADER.pack(0xFFFFFFFF, 1, 1, 0),
        HEADER.pack(0, 2, 1, 0),
        HEADER.pack(0, 1, 2, 0),
        HEADER.pack(0, 1, 9, 0),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100_000,
    ],
    ids=["too long", "4 GiB", "even stream", "an answer", "unknown type", "HTTP", "noise"],
)
async def test_a_frame_that_is_none_ends_its_connection_only(listening: Path, frame: bytes) -> None:
    async with await Client.connect(listening) as client:
        reader, writer = await asyncio.open_unix_connection(listening)
        writer.write(frame)
        async with asyncio.timeout(PATIENCE):
            assert await _until_closed(reader) == b""
        writer.close()
        assert (await call(client, "Connect")).shim_pid


async def test_requests_that_are_none(listening: Path) -> None:
    async with await Client.connect(listening) as client:
        for service, method in (
            (SERVICE, "Reboot"),
            ("containerd.task.v1.Task", "Connect"),
            ("containerd.runtime.sandbox.v1.Sandbox", "CreateSandbox"),
            ("", ""),
            ("x" * 100_000, "y"),
        ):
            with pytest.raises(ShimError) as refused:
                await client.call(service, method, Empty(), Empty, PATIENCE)
            assert refused.value.code == "unimplemented"
        with pytest.raises(ShimError) as refused:
            await client.call(SERVICE, "Connect", BytesValue(value=b"\xff"), Empty, PATIENCE)
        assert refused.value.code == "invalid-argument"
        with pytest.raises(ShimError) as refused:
            await call(client, "Checkpoint", id="c")
        assert refused.value.code == "unimplemented"
        assert "cannot be checkpointed" in refused.value.message


async def test_half_frames_hold_nobody_up(listening: Path) -> None:
    """Room is made for what has come, not for what was said to come."""
    with ExitStack() as callers:
        async with await Client.connect(listening) as client:
            shim = (await call(client, "Connect")).shim_pid
            before = resident(shim)
            for _ in range(100):
                sock = callers.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(listening))
                sock.sendall(HEADER.pack(MOST, 1, 1, 0) + bytes(1000))
            assert (await call(client, "Connect")).shim_pid == shim
            assert resident(shim) < before + (16 << 20)


async def test_thousands_of_requests_at_once(listening: Path) -> None:
    """Those that wait are counted; what is too much is refused, and others are answered meanwhile."""
    async with await Client.connect(listening) as flood, await Client.connect(listening) as other:
        shim = (await call(other, "Connect")).shim_pid
        before = resident(shim)
        waits = [asyncio.ensure_future(call(flood, "State", id="c")) for _ in range(5000)]
        assert (await call(other, "Connect")).shim_pid == shim
        ends = await asyncio.gather(*waits, return_exceptions=True)
    codes = {end.code for end in ends if isinstance(end, ShimError)}
    assert len(ends) == 5000
    assert codes <= {"resource-exhausted", "failed-precondition", "not-found"}
    assert "resource-exhausted" in codes
    assert resident(shim) < before + (32 << 20)


async def _until_closed(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
