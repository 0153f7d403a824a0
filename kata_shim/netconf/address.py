"""Addresses of a link: exactly those that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from ipaddress import ip_interface
from socket import AF_INET, AF_INET6, inet_pton
from struct import Struct
from typing import NamedTuple

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from kata_shim.errors import invalid
from kata_shim.netconf.netlink import NLM_F_CREATE, NLM_F_REPLACE, Netlink, attribute

# include/uapi/linux/rtnetlink.h, if_addr.h
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RT_SCOPE_LINK = 253
IFA_F_NODAD = 0x02
IFA_F_PERMANENT = 0x80
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_BROADCAST = 4
_REQUEST = Struct("=BBBBi")  # struct ifaddrmsg: family, prefix length, flags, scope, index


class Address(NamedTuple):
    """An IP address in canonical text, and its prefix length in bits."""

    family: int
    address: str
    prefix: int

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"


def parse(address: str, prefix: str | int) -> Address:
    """Return the address in its canonical form. Raises `invalid-argument`."""
    try:
        value = ip_interface(f"{address}/{int(prefix)}")
    except ValueError as error:
        raise invalid(
            f"address: {address}/{prefix} is not an IP address with its prefix length: {error}"
        ) from None
    return Address(AF_INET if value.version == 4 else AF_INET6, str(value.ip), value.network.prefixlen)


async def list_all(netlink: Netlink, index: int = 0) -> list[tuple[int, Address]]:
    """Return the configured addresses of the link (0: of all links), each with its link's index.

    Left out is what the kernel gave itself: IPv6 link-local addresses and those that it will take away again.
    """
    request = ifaddrmsg()
    request["index"] = index
    found = []
    for message in await netlink.dump(request, RTM_GETADDR, "list addresses"):
        kernels_own = message["family"] == AF_INET6 and message["scope"] == RT_SCOPE_LINK
        if not kernels_own and message["flags"] & IFA_F_PERMANENT and index in (0, message["index"]):
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            found.append((message["index"], Address(message["family"], text, message["prefixlen"])))
    return found


async def ensure(netlink: Netlink, index: int, wanted: Sequence[Address], *, fresh: bool = False) -> None:
    """Make these the addresses of the link, exactly; on an error they are what they were.

    IPv6 ones are usable at once (no duplicate address detection). A link that is `fresh` has none yet: then
    it costs one request for each address, else one dump more. Where `promote_secondaries` is off, the kernel
    takes an IPv4 address's fellows of the same subnet along with it, and all routes with the last one.
    """
    present = [] if fresh else [address for _, address in await list_all(netlink, index)]
    stale = [address for address in present if address not in wanted]
    async with AsyncExitStack() as undo:
        for address in wanted:
            if address not in present:
                undo.push_async_callback(_delete_if_there, netlink, index, address)
                await add(netlink, index, address)
        for address in stale:
            undo.push_async_callback(add, netlink, index, address)
            await delete(netlink, index, address)
        if any(address.family == AF_INET for address in stale):
            for address in wanted:
                await add(netlink, index, address)
        undo.pop_all()


async def add(netlink: Netlink, index: int, address: Address) -> None:
    """Give the link this address; nothing happens where it has it."""
    request = _request(index, address)
    if address.family == AF_INET and address.prefix < 31:
        hosts = (1 << 32 - address.prefix) - 1
        broadcast = int.from_bytes(inet_pton(AF_INET, address.address), "big") | hosts
        request += attribute(IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    await netlink.change(request, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, f"add address {address}")


async def delete(netlink: Netlink, index: int, address: Address) -> None:
    """Take this address from the link; raises `not-found` where it has not got it."""
    await netlink.change(_request(index, address), RTM_DELADDR, 0, f"delete address {address}")


async def _delete_if_there(netlink: Netlink, index: int, address: Address) -> None:
    if (index, address) in await list_all(netlink, index):
        await delete(netlink, index, address)


def _request(index: int, address: Address) -> bytes:
    flags = IFA_F_NODAD if address.family == AF_INET6 else 0
    packed = inet_pton(address.family, address.address)
    request = _REQUEST.pack(address.family, address.prefix, flags, 0, index)
    return request + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
