"""Neighbours: entries of the ARP and NDP tables."""

from __future__ import annotations

import ipaddress

from pyroute2.netlink.rtnl.ndmsg import ndmsg

from kata_shim.errors import invalid
from kata_shim.netconf.netlink import NLM_F_CREATE, NLM_F_REPLACE, Netlink

# include/uapi/linux/rtnetlink.h, neighbour.h
RTM_NEWNEIGH = 28
NUD_PERMANENT = 0x80


async def ensure(
    netlink: Netlink, index: int, address: str, mac: str, *, state: int = NUD_PERMANENT, flags: int = 0
) -> None:
    """Make `mac` the hardware address of the neighbour `address` on a link, with NUD_ state and NTF_ flags.

    Raises `invalid-argument` for what is not an address.
    """
    try:
        ip = ipaddress.ip_address(address)
        if len(bytes.fromhex(mac.replace(":", ""))) != 6:
            raise ValueError(f"{mac!r} is not a hardware address")
    except ValueError as error:
        raise invalid(f"neighbour {address} lladdr {mac}: {error}") from None
    request = ndmsg()
    request["family"] = 2 if ip.version == 4 else 10
    request["ifindex"] = index
    request["state"] = state or NUD_PERMANENT
    request["flags"] = flags
    request["attrs"] = [("NDA_DST", str(ip)), ("NDA_LLADDR", mac)]
    await netlink.change(request, RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, f"neighbour {ip} lladdr {mac}")
