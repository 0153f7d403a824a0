"""The guest's part of the floor: `python3 -c` of this, with hwAddr, name, MTU and ADDRESS/PREFIX (IPv4).

Waits for the link to come, configures it with one write of ready-made messages, waits for it to go, and says
both on the serial console. No asyncio, no library, nothing decoded that is not needed.
"""

import ipaddress
import os
import socket
import struct
import sys

CAME, WENT = b"\x02", b"\x03"

# include/uapi/linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 1, 4, 0x100, 0x400
NLMSG_ERROR = 2
RTMGRP_LINK = 1
RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK, RTM_NEWADDR = 16, 17, 19, 20
IFLA_IFNAME, IFLA_MTU = 3, 4
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
IFF_UP = 1


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body


def main(mac: str, name: str, mtu: str, address: str) -> None:
    hardware = bytes.fromhex(mac.replace(":", ""))
    ip = ipaddress.IPv4Interface(address)
    local, broadcast = ip.ip.packed, ip.network.broadcast_address.packed
    link = struct.pack("=BxHiII", 0, 0, 0, IFF_UP, IFF_UP)
    link += attribute(IFLA_MTU, struct.pack("=I", int(mtu))) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    target = struct.pack("=BBBBi", socket.AF_INET, ip.network.prefixlen, 0, 0, 0)
    target += (
        attribute(IFA_LOCAL, local) + attribute(IFA_ADDRESS, local) + attribute(IFA_BROADCAST, broadcast)
    )
    first = message(RTM_SETLINK, 0, link)
    request = bytearray(first + message(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, target))
    index_fields = (16 + 4, len(first) + 16 + 4)  # of ifinfomsg and of ifaddrmsg

    console = os.open("/dev/ttyS0", os.O_WRONLY | os.O_NOCTTY)
    asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    asking.bind((0, 0))
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, RTMGRP_LINK))
    os.write(1, b"ready\n")

    data = b""
    while hardware not in data:
        data = events.recv(65536)
    for field in index_fields:
        request[field : field + 4] = data[20:24]
    asking.send(request)
    answer = asking.recv(65536)
    os.write(console, CAME)
    kind, error = struct.unpack_from("=4xH10xi", answer)
    assert (kind, error) == (NLMSG_ERROR, 0), answer
    while data[4] != RTM_DELLINK or hardware not in data:
        data = events.recv(65536)
    os.write(console, WENT)


if __name__ == "__main__":
    main(*sys.argv[1:])
