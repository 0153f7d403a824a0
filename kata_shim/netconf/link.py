"""Links: find one, wait for one, bring its name, MTU and state to what is wanted."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from struct import Struct

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from kata_shim.netconf.netlink import NETLINK_ROUTE, KernelError, Message, Netlink, attribute

# include/uapi/linux/rtnetlink.h, if.h, if_tun.h
RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_SETLINK = 19
RTMGRP_LINK = 1
RTEXT_FILTER_SKIP_STATS = 8
IFF_UP = 1
IFF_TAP = 2
NET_NAME_ENUM = 1  # include/uapi/linux/netdevice.h
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4
IFLA_EXT_MASK = 29
_WANTED = (IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU)
_MESSAGE = Struct("=16x4xiI4x")  # struct nlmsghdr, struct ifinfomsg: index, flags
_REQUEST = Struct("=4xiII")  # struct ifinfomsg: index, flags, change
_ATTRIBUTE = Struct("=HH")  # struct rtattr

# A socket filter (Documentation/networking/filter.rst) that lets only new links pass: the kernel
# announces these, and no others, by RTM_NEWLINK with every bit of ifi_change set. An array of sock_filter.
SO_ATTACH_FILTER = 26
_LOAD_HALF, _LOAD_WORD, _JUMP_UNLESS_EQUAL, _RETURN = 0x28, 0x20, 0x15, 0x06
_ONLY_NEW = array(
    "B",
    b"".join(
        Struct("=HBBI").pack(*instruction)
        for instruction in (
            (_LOAD_HALF, 0, 0, 4),  # nlmsg_type
            (_JUMP_UNLESS_EQUAL, 0, 3, socket.htons(RTM_NEWLINK)),
            (_LOAD_WORD, 0, 0, 28),  # ifi_change
            (_JUMP_UNLESS_EQUAL, 0, 1, 0xFFFFFFFF),
            (_RETURN, 0, 0, 0xFFFFFFFF),
            (_RETURN, 0, 0, 0),
        )
    ),
)

_RECEIVE = 65536  # bytes; more than any one link message
_EVENTS_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel has it; `mac` is lower-case with colons, "" for none; `mtu` in bytes."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool


@dataclass(frozen=True, slots=True)
class TunTap:
    """What the driver tun has to say of a link; all False and 0 for one that is not its own.

    `queues` are those that are open, also while they are disabled; 0 where there can be only one.
    """

    tap: bool = False
    multi_queue: bool = False
    queues: int = 0


def from_message(message: Message) -> Link:
    """Return the link that an RTM_NEWLINK or RTM_DELLINK message is about."""
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
    )


def index_of(name: str) -> int:
    """Return the index of the link of that name in this process's network namespace; raises `not-found`."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise KernelError(errno.ENODEV, "", f"device {name}") from None


def name_of(index: int) -> str:
    """Return the name of the link of that index in this process's network namespace, "" when it has gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def is_named_by_kernel(name: str) -> bool:
    """Whether the link of that name has it from the kernel's own counting, and nobody has named it since.

    Reference: Documentation/ABI/testing/sysfs-class-net, name_assign_type. It sees the network namespace that
    /sys was mounted in; False where there is no such link.
    """
    try:
        with open(f"/sys/class/net/{name}/name_assign_type", "rb") as file:
            return int(file.read()) == NET_NAME_ENUM
    except OSError:  # EINVAL: the driver does not say
        return False


async def find(netlink: Netlink, name: str = "", index: int = 0) -> Link | None:
    """Return the link of that name or index."""
    request = _REQUEST.pack(index, 0, 0)
    request += attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, sys.byteorder))
    if name:
        request += attribute(IFLA_IFNAME, os.fsencode(name) + b"\0")
    try:
        return _unpack(await netlink.get(request, RTM_GETLINK, f"link {name or index}"))
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def find_tuntap(netlink: Netlink, name: str) -> TunTap | None:
    """Return what sort of tun or tap the link of that name is; None when there is no such link.

    Reference: include/uapi/linux/if_link.h, IFLA_TUN_*.
    """
    request = ifinfmsg()
    request["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS), ("IFLA_IFNAME", name)]
    try:
        message = netlink.get_now(request, RTM_GETLINK, f"link {name}")
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    info = message.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "tun":
        return TunTap()
    data = info.get_attr("IFLA_INFO_DATA")
    return TunTap(
        tap=data.get_attr("IFLA_TUN_TYPE") == IFF_TAP,
        multi_queue=bool(data.get_attr("IFLA_TUN_MULTI_QUEUE")),
        queues=data.get_attr("IFLA_TUN_NUM_QUEUES", 0) + data.get_attr("IFLA_TUN_NUM_DISABLED_QUEUES", 0),
    )


async def list_all(netlink: Netlink) -> list[Link]:
    """Return all links, in the order they came."""
    request = ifinfmsg()
    request["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS)]
    return [from_message(message) for message in await netlink.dump(request, RTM_GETLINK, "list links")]


async def ensure(netlink: Netlink, link: Link, *, name: str = "", mtu: int = 0, up: bool = True) -> Link:
    """Bring a link to this name and MTU ("" and 0: as they are) and up or down; return it as it is then.

    One request where the kernel allows it, none where nothing differs. Linux before 6.2 does not rename a
    link that is up: there it goes down for a moment, which takes its routes and IPv6 addresses along. On an
    error the link is as it was, but for those.
    """
    wanted = replace(link, name=name or link.name, mtu=mtu or link.mtu, up=up)
    if wanted == link:
        return link
    try:
        try:
            await _change(netlink, link, wanted)
        except KernelError as error:
            if error.errno != errno.EBUSY or not link.up or wanted.name == link.name:
                raise
            if await find(netlink, wanted.name):
                raise KernelError(errno.EEXIST, "", f"link {link.name}: name {wanted.name}") from None
            down = replace(link, up=False)
            await _change(netlink, link, down)
            await _change(netlink, down, wanted)
    except BaseException:
        with suppress(KernelError):
            await _put_back(netlink, link)
        raise
    return wanted


async def _change(netlink: Netlink, link: Link, wanted: Link) -> None:
    attributes = b""
    words = []
    flags = change = 0
    if wanted.mtu != link.mtu:
        attributes += attribute(IFLA_MTU, wanted.mtu.to_bytes(4, sys.byteorder))
        words.append(f"mtu {wanted.mtu}")
    if wanted.name != link.name:
        attributes += attribute(IFLA_IFNAME, os.fsencode(wanted.name) + b"\0")
        words.append(f"name {wanted.name}")
    if wanted.up != link.up:
        flags, change = IFF_UP if wanted.up else 0, IFF_UP
        words.append("up" if wanted.up else "down")
    request = _REQUEST.pack(link.index, flags, change) + attributes
    await netlink.change(request, RTM_SETLINK, 0, f"link {link.name}: {', '.join(words)}")


async def _put_back(netlink: Netlink, link: Link) -> None:
    """Undo what a request that the kernel refused in its middle may have done."""
    now = await find(netlink, index=link.index)
    if now is None or now == link:
        return
    if now.up and now.name != link.name:
        down = replace(now, up=False)
        await _change(netlink, now, down)
        now = down
    await _change(netlink, now, link)


class Monitor:
    """Tells waiting tasks of links that are new in its network namespace; one socket for all of them."""

    def __init__(self) -> None:
        """Subscribe to the kernel's link events (RTMGRP_LINK). Needs a running loop."""
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[asyncio.Queue[Link | None], bytes] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _EVENTS_BUFFER)
        # Each link has half a dozen events more in its life, and each would wake this process.
        self._socket.setsockopt(
            socket.SOL_SOCKET,
            SO_ATTACH_FILTER,
            Struct("@HP").pack(len(_ONLY_NEW) // 8, _ONLY_NEW.buffer_info()[0]),
        )
        self._socket.bind((0, RTMGRP_LINK))
        self._loop.add_reader(self._socket, self._read)

    @contextmanager
    def watch(self, mac: str) -> Iterator[asyncio.Queue[Link | None]]:
        """Collect from now on every new link of this hardware address, as it is when it appears.

        None says that events were lost and the caller has to look for itself. Who subscribes first and looks
        then misses nothing.
        """
        queue: asyncio.Queue[Link | None] = asyncio.Queue()
        self._watchers[queue] = bytes.fromhex(mac.replace(":", ""))
        try:
            yield queue
        finally:
            del self._watchers[queue]

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        # One event at a time: whoever waits for this one is not to wait for a look whether there are more.
        try:
            data = self._socket.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            for queue in self._watchers:
                queue.put_nowait(None)
            return
        for queue, mac in self._watchers.items():
            if mac in data and (link := _unpack(data)).mac == mac.hex(":"):
                queue.put_nowait(link)


def _unpack(data: bytes) -> Link:
    """Return the link that an RTM_NEWLINK is about; pyroute2 takes 2 ms for it in an emulated guest."""
    index, flags = _MESSAGE.unpack_from(data)
    found: dict[int, bytes] = {}
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(data):
        length, name = _ATTRIBUTE.unpack_from(data, at)
        if name in _WANTED:
            found[name] = data[at + _ATTRIBUTE.size : at + length]
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return Link(
        index=index,
        name=found[IFLA_IFNAME].rstrip(b"\0").decode(),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=int.from_bytes(found[IFLA_MTU], sys.byteorder),
        up=bool(flags & IFF_UP),
    )
