"""Runs in a guest: a client and three servers around it, each in a network namespace of its own.

The guest routes between them, and so its IPVS sees the traffic. Every server answers with its number, TCP and
UDP, on any port of PORTS. Calls come in on stdin, a JSON array a line: a method of Client and its arguments;
each is answered by a JSON line, the first line says that all are up. At the end of stdin all of it ends.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import selectors
import socket
import subprocess
import sys
import threading

SERVERS = (1, 2, 3)
PORTS = (80, 81, 8080)
VIRTUAL = ("10.9.0.1/32", "fd09::1/128")
CLIENTS = range(10, 22)  # the last parts of the client's addresses
CLONE_NEWNET = 0x40000000
PATIENCE = 20.0  # seconds

libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace, joined to the guest's by a veth pair; it lasts as long as this process."""

    def __init__(self, number: int, addresses: list[str]) -> None:
        """Make it, with the guest its router; sockets that are made from now on are its own."""
        ours, theirs = f"peer{number}", f"10.{number}.0.1"
        enter(HOME)
        _check(libc.unshare(CLONE_NEWNET))
        there = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        enter(HOME)
        path = f"/proc/{os.getpid()}/fd/{there}"
        _ip(
            f"link add {ours} type veth peer name eth0 netns {path}",
            f"address add {theirs}/24 dev {ours}",
            f"address add fd0{number}::1/64 dev {ours} nodad",
            f"link set {ours} up",
        )
        # A server that answers by itself (-g) does so as the virtual address, which is the guest's, too.
        for setting in ("forwarding", "accept_local"):
            _write(f"/proc/sys/net/ipv4/conf/{ours}/{setting}", "1")
        enter(there)
        _ip(
            "link set lo up",
            *(f"address add {address} dev eth0{' nodad' * (':' in address)}" for address in addresses),
            "link set eth0 up",
            f"route add default via {theirs}",
            f"route add ::/0 via fd0{number}::1",
        )


class Servers:
    """Three servers in three namespaces; a thread of their own serves them."""

    def __init__(self) -> None:
        """Have them listen."""
        self._selector = selectors.DefaultSelector()
        for number in SERVERS:
            Namespace(number, [f"10.{number}.0.2/24", f"fd0{number}::2/64"])
            _ip(*(f"address add {address} dev lo" for address in VIRTUAL))
            for port in PORTS:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    self._listen(str(number).encode(), port, kind)

    def serve(self) -> None:
        """Answer whatever comes."""
        while True:
            for key, _ in self._selector.select():
                self._answer(key.fileobj, key.data)  # type: ignore[arg-type]

    def _listen(self, name: bytes, port: int, kind: socket.SocketKind) -> None:
        listening = socket.socket(socket.AF_INET6, kind)
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(("::", port))
        if kind is socket.SOCK_STREAM:
            listening.listen()
        self._selector.register(listening, selectors.EVENT_READ, name)

    def _answer(self, ready: socket.socket, name: bytes) -> None:
        if ready.type is socket.SOCK_DGRAM:
            _, source = ready.recvfrom(100)
            ready.sendto(name, source)
        elif ready.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._selector.register(ready.accept()[0], selectors.EVENT_READ, name)
        else:
            try:
                said = ready.recv(100)
            except ConnectionError:
                said = b""
            if said:
                ready.send(name * len(said))
            else:
                self._selector.unregister(ready)
                ready.close()


class Client:
    """What the client does; a session is known by a number."""

    def __init__(self) -> None:
        """Be the only one whose sockets are made from now on."""
        addresses = [f"10.4.0.{last}/24" for last in CLIENTS] + [f"fd04::{last}/64" for last in CLIENTS]
        Namespace(4, addresses)
        self._sessions: dict[int, socket.socket] = {}
        self._ports = itertools.count(10000)  # none comes twice: IPVS would take its session for the old one

    def open(self, source: str, target: str, port: int, protocol: str) -> tuple[int, str]:
        """Open a session and return it, and who answered."""
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        session = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        session.settimeout(PATIENCE)
        session.bind((source, next(self._ports)))
        session.connect((target, port))
        number = session.fileno()
        self._sessions[number] = session
        return number, self.ask(number)

    def ask(self, number: int) -> str:
        """Say a byte in a session and return who answered; raises when it was reset."""
        self.say(number)
        return self.hear(number)

    def say(self, number: int) -> None:
        """Say a byte."""
        self._sessions[number].send(b"?")

    def hear(self, number: int) -> str:
        """Wait for an answer."""
        return self._sessions[number].recv(1).decode()

    def heard(self, number: int) -> str | None:
        """Return an answer that is there already."""
        session = self._sessions[number]
        session.setblocking(False)
        try:
            return session.recv(1).decode()
        except BlockingIOError:
            return None
        finally:
            session.settimeout(PATIENCE)

    def close(self, number: int) -> None:
        """End a session, and return when the server has ended it, too."""
        with self._sessions.pop(number) as session:
            if session.type is socket.SOCK_STREAM:
                session.shutdown(socket.SHUT_WR)
                session.recv(1)

    def visit(self, sources: list[str], target: str, port: int, protocol: str) -> list[str]:
        """Have a short session from each source in turn, and return who answered."""
        answers = []
        for source in sources:
            number, answer = self.open(source, target, port, protocol)
            answers.append(answer)
            self.close(number)
        return answers


def enter(namespace: int) -> None:
    """Have this thread make its sockets in a namespace."""
    _check(libc.setns(namespace, CLONE_NEWNET))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _ip(*commands: str) -> None:
    text = "".join(f"{command}\n" for command in commands)
    subprocess.run(["ip", "-batch", "-"], input=text.encode(), check=True)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main() -> None:
    """Set all up, and do what the client is asked for."""
    _ip(*(f"address replace {address} dev lo" for address in VIRTUAL))
    _write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
    servers, client = Servers(), Client()
    threading.Thread(target=servers.serve, daemon=True).start()
    print(json.dumps("up"), flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = getattr(client, method)(*arguments)
        except OSError as error:
            answer = {"error": errno.errorcode.get(error.errno or 0, str(error))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    HOME = os.open("/proc/self/ns/net", os.O_RDONLY)
    main()
