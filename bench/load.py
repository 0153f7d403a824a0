"""(o) Eight clients that change NICs, routes and IPVS rules at the same time: how long each waits.

Each has a connection, one NIC, the routes over it and services of its own, knows what must be there of them,
and looks at that in between. In the end all who know of it are asked.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import agreement
from bench.place import Ground
from bench.stand import Stand

CLIENTS = 8
SEED = 4
TIMEOUT = 60.0  # seconds for one answer
MOST = 6  # routes, services, and servers of a service, of one client
RESTORED = 20  # servers of one restore
MTUS = (1400, 1450, 1500)


class RefusedError(Exception):
    """An answer that is an error."""


@dataclass
class Owned:
    """What one client must find."""

    nic: dict[str, Any] | None = None
    routes: set[tuple[str, str]] = field(default_factory=set)  # destination and gateway
    services: dict[str, dict[str, int]] = field(default_factory=dict)  # weights of servers

    def rules(self) -> set[str]:
        """The services as `ipvsadm -Sn` says them."""
        found = set()
        for service, servers in self.services.items():
            found.add(f"-A -t {service} -s rr -p 300")
            found |= {f"-a -t {service} -r {server} -m -w {weight}" for server, weight in servers.items()}
        return found


class Client(threading.Thread):
    """One connection, which does one thing after the other until it is time to end."""

    def __init__(self, stand: Stand, number: int, end: float) -> None:
        super().__init__()
        self.number = number
        self.owned = Owned()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []
        self._end = end
        self._chance = random.Random(SEED + number)
        self._device = f"eth-load{number}"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(stand.directory / "shim.sock"))
        self._answers = self._socket.makefile("rb")

    def run(self) -> None:
        """Do what it can do now, drawn by chance."""
        try:
            while time.monotonic() < self._end:
                work = self._chance.choice(self._possible())
                try:
                    work()
                except RefusedError as error:
                    self.wrong.append(f"client {self.number}, {work.__name__}: {error}")
        except Exception as error:
            self.wrong.append(f"client {self.number} ended: {type(error).__name__}: {error}")
        finally:
            self._answers.close()
            self._socket.close()

    def _possible(self) -> list[Callable[[], None]]:
        owned = self.owned
        found = [self.list_ifaces, self.list_routes, self.save_rules, self.restore]
        if owned.nic is None:
            found += [self.add_iface] * 4
        else:
            found += [self.del_iface, self.update_iface]
            found += [self.add_route] * 2 if len(owned.routes) < MOST else []
            found += [self.del_route] if owned.routes else []
        found += [self.add_service] if len(owned.services) < MOST else [self.delete_service]
        if owned.services:
            found += [self.add_server] * 2
        if any(owned.services.values()):
            found += [self.edit_server, self.delete_server]
        return found

    # NICs

    def add_iface(self) -> None:
        """A NIC with an address."""
        nic = {
            "device": f"tap-load{self.number}",
            "name": self._device,
            "IPAddresses": [{"address": f"10.{100 + self.number}.0.2", "mask": "24"}],
            "mtu": self._chance.choice(MTUS),
            "hwAddr": f"02:42:20:6f:b0:{self.number:02x}",
        }
        self._network("add-iface", nic)
        self.owned.nic = nic

    def update_iface(self) -> None:
        """Another MTU."""
        nic = {**(self.owned.nic or {}), "mtu": self._chance.choice(MTUS)}
        self._network("update-iface", nic)
        self.owned.nic = nic

    def del_iface(self) -> None:
        """With the NIC the guest's kernel lets go of its routes."""
        self._network("del-iface", {"name": self._device})
        self.owned.nic = None
        self.owned.routes.clear()

    def list_ifaces(self) -> None:
        """All, of which one may be this client's."""
        told = self._network("list-ifaces") or []
        self._same("list-ifaces", agreement.own_ifaces(told, self._device), agreement.ifaces([self.owned]))

    # Routes

    def add_route(self) -> None:
        """One that is not there."""
        dest = f"10.{120 + self.number}.{self._chance.randrange(256)}.0/24"
        route = (dest, f"10.{100 + self.number}.0.1")
        if route not in self.owned.routes:
            self._network("add-route", {"dest": dest, "gateway": route[1], "device": self._device})
            self.owned.routes.add(route)

    def del_route(self) -> None:
        """One that is there."""
        route = self._chance.choice(sorted(self.owned.routes))
        self._network("del-route", {"dest": route[0], "device": self._device})
        self.owned.routes.discard(route)

    def list_routes(self) -> None:
        """All, of which some may be this client's."""
        told = self._network("list-routes") or []
        own = agreement.own_routes(told, self._device)
        self._same("list-routes", own, agreement.routes([self.owned]))

    # IPVS

    def add_service(self) -> None:
        """One without servers."""
        service = self._service()
        if service not in self.owned.services:
            self._rule("add-service", f"-A -t {service} -s rr -p 300")
            self.owned.services[service] = {}

    def delete_service(self) -> None:
        """With its servers."""
        service = self._chance.choice(sorted(self.owned.services))
        self._rule("delete-service", f"-D -t {service}")
        del self.owned.services[service]

    def add_server(self) -> None:
        """One that is not there."""
        service = self._chance.choice(sorted(self.owned.services))
        server, weight = f"10.9.{self._chance.randrange(256)}.1:80", self._chance.randrange(100)
        servers = self.owned.services[service]
        if server not in servers:
            self._rule("add-server", f"-a -t {service} -r {server} -m -w {weight}")
            servers[server] = weight

    def edit_server(self) -> None:
        """Another weight."""
        service, server = self._any_server()
        weight = self._chance.randrange(100)
        self._rule("edit-server", f"-e -t {service} -r {server} -m -w {weight}")
        self.owned.services[service][server] = weight

    def delete_server(self) -> None:
        """One of those that are there."""
        service, server = self._any_server()
        self._rule("delete-server", f"-d -t {service} -r {server}")
        del self.owned.services[service][server]

    def restore(self) -> None:
        """A service and its servers at once, on top of what there is, in the place of an older one."""
        service = f"10.{140 + self.number}.255.1:80"
        servers = {f"10.9.{number}.2:80": self._chance.randrange(100) for number in range(RESTORED)}
        lines = [f"-D -t {service}"] if service in self.owned.services else []
        lines += sorted(Owned(services={service: servers}).rules())
        text = "\n".join(lines)
        self._call("restore", "kata-ipvs.restore", {"rules": text, "dialect": "ipvsadm"})
        self.owned.services[service] = servers

    def save_rules(self) -> None:
        """All, of which some may be this client's."""
        params = {"parameters": "-S -n", "dialect": "ipvsadm"}
        told = self._call("list rules", "kata-ipvs.ipvsadm", params)["stdout"].splitlines()
        self._same("-Sn", {line for line in told if f" 10.{140 + self.number}." in line}, self.owned.rules())

    def _service(self) -> str:
        return f"10.{140 + self.number}.{self._chance.randrange(255)}.1:80"

    def _any_server(self) -> tuple[str, str]:
        pairs = [(service, server) for service, servers in self.owned.services.items() for server in servers]
        return self._chance.choice(sorted(pairs))

    def _network(self, method: str, params: object = None) -> Any:
        return self._call(method, f"kata-network.{method}", params)

    def _rule(self, name: str, text: str) -> None:
        self._call(name, "kata-ipvs.ipvsadm", {"parameters": text})

    def _call(self, name: str, method: str, params: object) -> Any:
        line = json.dumps({"id": 1, "method": method, "params": params}).encode() + b"\n"
        began = time.perf_counter()
        self._socket.sendall(line)
        while True:
            said = self._answers.readline()
            if not said:
                raise RuntimeError("the shim closed the connection")
            answer = json.loads(said)
            if "error" in answer:
                raise RefusedError(answer["error"]["message"])
            if "result" in answer:
                self.seconds[name].append(time.perf_counter() - began)
                return answer["result"]

    def _same(self, what: str, told: set[Any], must: set[Any]) -> None:
        self.wrong += agreement.differences(f"client {self.number}, {what}", told, must)


def load(ground: Ground, seconds: float) -> str:
    """Return the table of one run, and every inconsistency by its name."""
    with Stand(ground) as stand:
        began = time.monotonic()
        clients = [Client(stand, number, began + seconds) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        took = time.monotonic() - began
        wrong = [line for client in clients for line in client.wrong]
        wrong += agreement.everywhere(stand, [client.owned for client in clients])
    return _text(clients, took, wrong)


def _text(clients: list[Client], took: float, wrong: list[str]) -> str:
    found: dict[str, list[float]] = defaultdict(list)
    for client in clients:
        for name, values in client.seconds.items():
            found[name] += values
    rows = ["| (o) | times | p50 | p99 | most |", "|---|---|---|---|---|"]
    for name, values in sorted(found.items()):
        values.sort()
        cells = [values[len(values) * part // 100] for part in (50, 99)] + [values[-1]]
        shown = " | ".join(f"{value * 1000:.1f} ms" for value in cells)
        rows.append(f"| {name} | {len(values):,} | {shown} |")
    total = sum(map(len, found.values()))
    said = f"{len(clients)} clients, {took:.0f} s, {total:,} operations ({total / took:,.0f}/s)"
    lines = [*rows, "", f"{said}; inconsistencies: **{len(wrong)}**."]
    return "\n".join([*lines, *(f"- {one}" for one in wrong)])
