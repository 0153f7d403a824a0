"""The guest's part of the IPVS cases: `python3 -c` of this; prints the seconds that something took there.

`time FILE COMMAND…`: a command from its start to its end, with FILE as its stdin.
`floor FILE`: the netlink messages in FILE, sent in batches on one socket, until the last is acknowledged.
"""

import os
import socket
import struct
import sys
import time

BATCH = 1 << 18  # bytes
CONTROL, GET_FAMILY, FAMILY_NAME, FAMILY_ID = 16, 3, 2, 1
SO_SNDBUFFORCE = 32


def elapsed(path: str, command: list[str]) -> float:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, path, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
    ]
    began = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, dict(os.environ), file_actions=actions)
    _, status = os.waitpid(pid, 0)
    took = time.perf_counter() - began
    if status:
        sys.exit(f"{command} ended with status {os.waitstatus_to_exitcode(status)}")
    return took


def floor(path: str) -> float:
    with open(path, "rb") as file:
        messages = bytearray(file.read())
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
    netlink.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 22)
    family = struct.pack("=H", family_of(netlink))
    batches, begin, at = [], 0, 0
    while at < len(messages):
        messages[at + 4 : at + 6] = family
        at += struct.unpack_from("=I", messages, at)[0]
        if at - begin >= BATCH or at == len(messages):
            batches.append(bytes(messages[begin:at]))
            begin = at
    began = time.perf_counter()
    for batch in batches:
        netlink.send(batch)
    answer = netlink.recv(1 << 16)
    took = time.perf_counter() - began
    if struct.unpack_from("=i", answer, 16)[0]:
        sys.exit("the kernel refused a message")
    return took


def family_of(netlink: socket.socket) -> int:
    name = struct.pack("=HH", 9, FAMILY_NAME) + b"IPVS\0\0\0\0"
    netlink.send(struct.pack("=IHHIIBBH", 20 + len(name), CONTROL, 1, 1, 0, GET_FAMILY, 1, 0) + name)
    answer, at = netlink.recv(1 << 16), 20
    while True:
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == FAMILY_ID:
            return int(struct.unpack_from("=H", answer, at + 4)[0])
        at += length + -length % 4


if __name__ == "__main__":
    print(elapsed(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "time" else floor(sys.argv[2]))
