"""Connection tracking's entries, found by where they were first sent, and deleted one by one. Pure.

References: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nfnetlink.h; for the filter's flags
net/netfilter/nf_internals.h; for what is deleted net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kata_shim.ipvs import netlink
from kata_shim.ipvs.netlink import Fields
from kata_shim.ipvs.rules import AF_INET, AF_INET6

PROTOCOL = 12  # NETLINK_NETFILTER
_GET = 0x101  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_DELETE = 0x102
# CTA_*
_ORIGINAL, _ID, _ZONE, _FILTER = 1, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_DESTINATION, _V6_DESTINATION = 2, 4
_PROTOCOL_NUMBER = 1
_FILTER_ORIGINAL = 1
_BY_DESTINATION = 0x2  # CTA_FILTER_F_CTA_IP_DST
_BY_PROTOCOL = 0x8  # CTA_FILTER_F_CTA_PROTO_NUM

_FAMILY_HEADER = struct.Struct("=BBH")  # nfgenmsg: family, version, resource id
_LONGEST = 512  # bytes of what names one entry


class Entry(NamedTuple):
    """What names one entry in its kernel: attributes, packed as they came."""

    attributes: bytes


def find(address: bytes, protocol: int, sequence: int) -> bytes:
    """Return the message that asks for the entries first sent to `address` by `protocol`.

    By IPv6 the answer holds those to other addresses, too: Linux 6.1 has that comparison inverted
    (ctnetlink_filter_match_tuple).
    """
    family = _family(address)
    by_address = _BY_DESTINATION if family == AF_INET else 0
    destination = _V4_DESTINATION if family == AF_INET else _V6_DESTINATION
    where = netlink.attribute(_TUPLE_IP | netlink.NESTED, netlink.attribute(destination, address))
    how = netlink.attribute(_TUPLE_PROTO | netlink.NESTED, netlink.u8(_PROTOCOL_NUMBER, protocol))
    flags = netlink.u32(_FILTER_ORIGINAL, by_address | _BY_PROTOCOL)
    body = netlink.attribute(_ORIGINAL | netlink.NESTED, where + how)
    body += netlink.attribute(_FILTER | netlink.NESTED, flags)
    return netlink.message(_GET, netlink.NLM_F_DUMP, sequence, _FAMILY_HEADER.pack(family, 0, 0), body)


def read(body: memoryview, address: bytes, protocol: int) -> Entry | None:
    """Return the entry of one answer, None for one that was not asked for; raises WireError."""
    fields = Fields(body)
    original = Fields(fields.nested(_ORIGINAL))
    destination = _V4_DESTINATION if len(address) == 4 else _V6_DESTINATION
    where, how = Fields(original.nested(_TUPLE_IP)), Fields(original.nested(_TUPLE_PROTO))
    if destination not in where or where.value(destination, len(address)) != address:
        return None
    if how.u8(_PROTOCOL_NUMBER) != protocol:
        return None
    named = netlink.attribute(_ORIGINAL | netlink.NESTED, bytes(fields.nested(_ORIGINAL)))
    for kind in (_ID, _ZONE):
        if kind in fields:
            named += netlink.attribute(kind, bytes(fields.nested(kind)))
    if len(named) > _LONGEST:
        raise netlink.WireError(f"an entry named by {len(named)} bytes")
    return Entry(named)


def delete(entry: Entry, address: bytes, sequence: int) -> bytes:
    """Return the message that deletes one entry, to be acknowledged; ENOENT: it has ended by itself."""
    header = _FAMILY_HEADER.pack(_family(address), 0, 0)
    return netlink.message(_DELETE, netlink.NLM_F_ACK, sequence, header, entry.attributes)


def _family(address: bytes) -> int:
    return AF_INET if len(address) == 4 else AF_INET6
