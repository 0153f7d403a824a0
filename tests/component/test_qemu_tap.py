"""Opening taps: those that exist and those that do not, single and multi-queue, and what is no tap."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu.tap import open_tap
from tests.component.netns import network_namespace

pytestmark = pytest.mark.quick

# include/uapi/linux/if_tun.h
TUNSETQUEUE = 0x400454D9
IFF_DETACH_QUEUE = 0x0400


def ip(*arguments: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *arguments], check=True)


def exists(device: str) -> bool:
    """Whether there is such a network device."""
    return device in (name for _, name in socket.if_nameindex())


@pytest.fixture
def tap() -> Iterator[str]:
    """A single-queue tap that exists already."""
    ip("tuntap", "add", "t-one", "mode", "tap")
    yield "t-one"
    ip("link", "delete", "t-one")


@pytest.fixture
def multi_queue_tap() -> Iterator[str]:
    """A multi-queue tap that exists already."""
    ip("tuntap", "add", "t-many", "mode", "tap", "multi_queue")
    yield "t-many"
    ip("link", "delete", "t-many")


@pytest.mark.parametrize("queues", [1, 5])
def test_a_tap_that_does_not_exist_lives_as_long_as_its_descriptors(queues: int) -> None:
    with open_tap("t-new", queues) as opened:
        assert (opened.created, len(opened.fds)) == (True, queues)
        assert exists("t-new")
        kept = os.dup(opened.fds[0])
    assert exists("t-new"), "QEMU's own descriptors keep it"
    os.close(kept)
    assert not exists("t-new")


def test_an_existing_tap_stays(tap: str) -> None:
    for _ in range(2):
        with open_tap(tap) as opened:
            assert not opened.created
        assert exists(tap)


@pytest.mark.parametrize("queues", [1, 4])
def test_an_existing_multi_queue_tap(multi_queue_tap: str, queues: int) -> None:
    with open_tap(multi_queue_tap, queues) as opened:
        assert (opened.created, len(opened.fds)) == (False, queues)
    assert exists(multi_queue_tap)


def test_more_queues_than_a_single_queue_tap_has(tap: str) -> None:
    with pytest.raises(
        ShimError, match="queues: 2 needs a multi-queue tap, and t-one has a single queue"
    ) as caught:
        open_tap(tap, 2)
    assert caught.value.code == "failed-precondition"


def test_a_busy_tap(tap: str, multi_queue_tap: str) -> None:
    descriptors = os.listdir("/proc/self/fd")
    for device in (tap, multi_queue_tap):
        with open_tap(device), pytest.raises(ShimError, match=f"device: tap {device} is in use"):
            open_tap(device)
    with open_tap("t-new"), pytest.raises(ShimError, match="device: tap t-new is in use"):
        open_tap("t-new")
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@pytest.mark.parametrize("how", ["link add t-odd type veth peer t-peer", "tuntap add t-odd mode tun"])
def test_what_is_no_tap(how: str) -> None:
    ip(*how.split())
    try:
        with pytest.raises(ShimError, match="device: t-odd exists and is not a tap") as caught:
            open_tap("t-odd")
        assert caught.value.code == "failed-precondition"
    finally:
        ip("link", "delete", "t-odd")


def test_a_network_namespace_without_a_sysfs_of_its_own() -> None:
    """As `nsenter --net` and `unshare --net` leave it: /sys goes on showing the devices of another."""
    with network_namespace():
        ip("tuntap", "add", "t-one", "mode", "tap")
        ip("tuntap", "add", "t-many", "mode", "tap", "multi_queue")
        for device, queues in (("t-new", 1), ("t-new", 3), ("t-one", 1), ("t-many", 1), ("t-many", 3)):
            assert not Path("/sys/class/net", device).exists()
            with open_tap(device, queues) as opened:
                assert (opened.created, len(opened.fds)) == (device == "t-new", queues)
                with pytest.raises(ShimError, match=f"device: tap {device} is in use"):
                    open_tap(device, queues)
        with pytest.raises(ShimError, match="t-one has a single queue"):
            open_tap("t-one", 2)
        with pytest.raises(ShimError, match="nic exists and is not a tap"):
            open_tap("nic")


def test_a_disabled_queue_of_another_is_in_use_too(multi_queue_tap: str) -> None:
    with open_tap(multi_queue_tap) as opened:
        fcntl.ioctl(opened.fds[0], TUNSETQUEUE, struct.pack("16sH22x", b"", IFF_DETACH_QUEUE))
        with pytest.raises(ShimError, match=f"device: tap {multi_queue_tap} is in use"):
            open_tap(multi_queue_tap)


@contextmanager
def descriptors_below(number: int) -> Iterator[None]:
    """Let this process open no descriptor from `number` on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_out_of_descriptors() -> None:
    free = os.dup(0)
    os.close(free)
    descriptors = os.listdir("/proc/self/fd")
    refused = []
    for limit in range(free, free + 100):
        try:
            with descriptors_below(limit), open_tap("t-new", 3):
                break
        except ShimError as error:
            refused.append((error.code, error.message.rpartition(": ")[2], exists("t-new")))
    assert len(refused) >= 4, "rtnetlink's and one for each queue"
    assert set(refused) == {("resource-exhausted", "Too many open files", False)}
    assert os.listdir("/proc/self/fd") == descriptors


def test_vhost_is_used_where_the_host_has_it() -> None:
    with open_tap("t-new", 2, vhost=True) as opened:
        assert len(opened.vhost_fds) == (2 if Path("/dev/vhost-net").exists() else 0)
