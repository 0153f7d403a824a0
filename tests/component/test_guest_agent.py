"""The agent as an ordinary process in a namespace of its own, and its virtio-serial end on a socket pair."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kata_shim import __version__
from kata_shim.errors import ShimError
from kata_shim.guest.pci import interface_at, is_at
from kata_shim.guest.relay import MAX_RELAYS
from kata_shim.protos.agent_pb2 import (
    AddARPNeighborsRequest,
    ARPNeighbors,
    CreateSandboxRequest,
    Routes,
    SetGuestDateTimeRequest,
    Storage,
    UpdateInterfaceRequest,
    UpdateRoutesRequest,
)
from kata_shim.protos.guest_pb2 import (
    STDERR,
    STDOUT,
    AddRouteRequest,
    ClaimRequest,
    CloseStdinRequest,
    CountTableRequest,
    DeleteRoutesRequest,
    KillCommandRequest,
    ReadOutputRequest,
    ReadTableRequest,
    RelayNetlinkRequest,
    StartCommandRequest,
    WaitCommandRequest,
    WriteStdinRequest,
)
from kata_shim.protos.health_pb2 import HealthCheckResponse
from kata_shim.protos.services import AGENT_SERVICE, GUEST_SERVICE, HEALTH_SERVICE, RELAY_PIECE, SERVICES
from kata_shim.protos.types_pb2 import ARPNeighbor, Interface, IPAddress, Route
from kata_shim.ttrpc.client import Client
from tests.component.guest_calls import SOON, call, finish, gone, read, refused, sh, start
from tests.component.netns import MAC, ip, network_namespace

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


def mac_of(name: str) -> str:
    """The hardware address of a link."""
    return ip(f"-o link show {name}").split("link/ether ")[1].split()[0]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    """A client of an agent of its own."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        arguments = ["-m", "kata_shim.guest.main", "--listen-fd", str(listener.fileno())]
        # /sys shows the network namespace that it was mounted in.
        see_links = ["sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
        command = ["unshare", "--uts", "--mount", *see_links, sys.executable, "-W", "error", *arguments]
        agent = await asyncio.create_subprocess_exec(*command, pass_fds=[listener.fileno()])
    async with await Client.connect(tmp_path / "agent.sock") as connected:
        yield connected
        await call(connected, "DestroySandbox")
    async with asyncio.timeout(SOON):
        assert await agent.wait() == 0


class TestHealth:
    async def test_check_version_and_details(self, client: Client) -> None:
        assert (await call(client, "Check")).status == HealthCheckResponse.SERVING
        assert (await call(client, "Version")).agent_version == __version__
        details = (await call(client, "GetGuestDetails")).agent_details
        assert (details.version, details.init_daemon) == (__version__, False)
        assert set(SERVICES) == {AGENT_SERVICE, HEALTH_SERVICE, GUEST_SERVICE}

    async def test_create_sandbox(self, client: Client) -> None:
        await call(client, "CreateSandbox", CreateSandboxRequest(hostname="h" * 70, sandbox_id="s"))
        assert (await sh(client, "uname -n"))[1] == b"h" * 64 + b"\n"
        request = CreateSandboxRequest(storages=[Storage(driver="nfs")])
        assert (await refused(client, "CreateSandbox", request))[0] == "unimplemented"
        request = CreateSandboxRequest(storages=[Storage(driver="9p", mount_point="/run/../etc")])
        assert (await refused(client, "CreateSandbox", request))[0] == "invalid-argument"

    async def test_claim(self, client: Client) -> None:
        """Under an init of its own the machine id is not the agent's business."""
        before = await sh(client, "cat /etc/machine-id")
        for name in ("first", "second"):
            await call(client, "Claim", ClaimRequest(seed=b"x" * 64, name=name, machine_id="0" * 32))
            assert (await sh(client, "uname -n"))[1] == f"{name}\n".encode()
        assert await sh(client, "cat /etc/machine-id") == before

    async def test_standing_still_is_for_ports(self, client: Client) -> None:
        await call(client, "StandStill")
        assert (await sh(client, "echo hello"))[1] == b"hello\n"

    async def test_wrong_time(self, client: Client) -> None:
        request = SetGuestDateTimeRequest(Sec=1, Usec=1_000_000)
        code, message = await refused(client, "SetGuestDateTime", request)
        assert (code, message) == ("invalid-argument", "Usec: 1000000 is not within 0..999999")


class TestNetwork:
    @staticmethod
    def wanted(*addresses: str, **more: Any) -> UpdateInterfaceRequest:
        listed = [IPAddress(address=a.split("/")[0], mask=a.split("/")[1]) for a in addresses]
        fields = {"device": "nic", "name": "nic", "hwAddr": MAC, "mtu": 1400, "IPAddresses": listed}
        return UpdateInterfaceRequest(interface=Interface(**{**fields, **more}))

    async def test_update_interface(self, client: Client) -> None:
        request = self.wanted("172.16.0.3/16", name="eth-test", hwAddr=MAC.upper())
        for _ in range(2):
            answer = await call(client, "UpdateInterface", request)
            assert (answer.name, answer.mtu, answer.hwAddr) == ("eth-test", 1400, MAC)
        line = "172.16.0.0/16 dev eth-test proto kernel scope link src 172.16.0.3"
        assert ip("route").strip() == line
        listed = {one.name: one for one in (await call(client, "ListInterfaces")).Interfaces}
        assert set(listed) == {"lo", "eth-test", "peer"}
        assert [str(a.mask) for a in listed["eth-test"].IPAddresses] == ["16"]

    async def test_by_name(self, client: Client) -> None:
        await call(client, "UpdateInterface", self.wanted("fd00::3/64", hwAddr=""))
        assert "fd00::3/64" in ip("addr show dev nic")

    async def test_two_that_change_names(self, client: Client) -> None:
        """Both have them from the kernel, which counts in the order that it found them in."""
        ip("link add type veth")
        one, two = mac_of("veth0"), mac_of("veth1")
        first = self.wanted("10.1.0.1/16", name="veth1", hwAddr=one)
        second = self.wanted("10.2.0.1/16", name="veth0", hwAddr=two)
        await asyncio.gather(call(client, "UpdateInterface", first), call(client, "UpdateInterface", second))
        assert (mac_of("veth0"), mac_of("veth1")) == (two, one)

    async def test_a_name_that_was_given_stays(self, client: Client) -> None:
        """Also that of a link which is down."""
        ip("link set peer down")
        before = ip("-br link")
        found = await refused(client, "UpdateInterface", self.wanted(name="peer"))
        assert found[0] == "already-exists"
        assert ip("-br link") == before

    async def test_renaming_keeps_the_routes(self, client: Client) -> None:
        addresses = ("172.16.0.3/16", "fd00::3/64")
        await call(client, "UpdateInterface", self.wanted(*addresses))
        await call(client, "AddRoute", AddRouteRequest(route=Route(dest="10.0.0.0/8", gateway="172.16.0.1")))
        await call(client, "AddRoute", AddRouteRequest(route=Route(dest="fd01::/64", gateway="fd00::1")))
        await call(client, "UpdateInterface", self.wanted(*addresses, name="other"))
        assert "10.0.0.0/8 via 172.16.0.1 dev other" in ip("route")
        assert "fd01::/64 via fd00::1 dev other" in ip("-6 route")

    @pytest.mark.parametrize(
        ("changed", "code", "words"),
        [
            ({"mtu": 70000}, "invalid-argument", "mtu greater than device maximum"),
            ({"name": "peer"}, "already-exists", "File exists"),
            ({"hwAddr": "02:00:00:00:00:09"}, "not-found", "no network interface 02:00:00:00:00:09"),
            ({"hwAddr": "02"}, "invalid-argument", "hwAddr: 02 is not a hardware address"),
            ({"IPAddresses": [IPAddress(address="1.2", mask="8")]}, "invalid-argument", "address: 1.2/8"),
            ({"IPAddresses": [IPAddress(address="ff02::5", mask="64")]}, "not-found", "Cannot assign"),
            ({"devicePath": "1/00"}, "invalid-argument", "devicePath: 1/00 is not slot"),
        ],
    )
    async def test_a_refusal_leaves_the_interface_as_it_was(
        self, client: Client, changed: dict[str, Any], code: str, words: str
    ) -> None:
        before = ip("-o addr show dev nic"), ip("-br link show nic")
        found = await refused(client, "UpdateInterface", self.wanted(**{"name": "new", **changed}))
        assert found[0] == code
        assert words in found[1]
        assert (ip("-o addr show dev nic"), ip("-br link show nic")) == before

    async def test_routes(self, client: Client) -> None:
        await call(client, "UpdateInterface", self.wanted("172.16.0.3/16"))
        request = AddRouteRequest(route=Route(dest="177.17.9.9/24", gateway="172.16.0.1", device="nic"))
        answer = await call(client, "AddRoute", request)
        assert (answer.dest, answer.gateway, answer.device) == ("177.17.9.0/24", "172.16.0.1", "nic")
        words = "route 177.17.9.0/24 via 172.16.0.1 dev nic: File exists"
        assert await refused(client, "AddRoute", request) == ("already-exists", words)
        listed = (await call(client, "ListMainRoutes")).Routes
        assert [one.dest for one in listed] == ["172.16.0.0/16", "177.17.9.0/24"]
        assert (await call(client, "ListRoutes")).Routes == listed
        match = DeleteRoutesRequest(dest="177.17.9.0/24")
        assert [one.dest for one in (await call(client, "DeleteRoutes", match)).Routes] == ["177.17.9.0/24"]
        assert (await refused(client, "DeleteRoutes", match))[0] == "not-found"
        assert (await refused(client, "DeleteRoutes", DeleteRoutesRequest()))[1] == "dest: missing"

    async def test_update_routes(self, client: Client) -> None:
        await call(client, "UpdateInterface", self.wanted("172.16.0.3/16"))
        routes = [
            Route(dest="default", gateway="172.16.0.1", device="nic"),
            Route(dest="9.9.9.9", device="nic"),
        ]
        answer = await call(client, "UpdateRoutes", UpdateRoutesRequest(routes=Routes(Routes=routes)))
        assert [one.dest for one in answer.Routes] == ["default", "9.9.9.9/32"]
        assert len((await call(client, "ListRoutes")).Routes) == 3

    async def test_neighbours(self, client: Client) -> None:
        await call(client, "UpdateInterface", self.wanted("172.16.0.3/16"))
        one = ARPNeighbor(
            toIPAddress=IPAddress(address="172.16.0.9"), device="nic", lladdr="02:00:00:00:00:05"
        )
        request = AddARPNeighborsRequest(neighbors=ARPNeighbors(ARPNeighbors=[one]))
        await call(client, "AddARPNeighbors", request)
        assert "02:00:00:00:00:05 PERMANENT" in ip("neigh show 172.16.0.9")


class TestPciPath:
    def test_nothing_there(self) -> None:
        assert interface_at("1f.7") == ""
        assert interface_at("1f.7/00") == ""
        assert not is_at("lo", "1f.7/00")
        assert not is_at("gone", "1f.7/00")

    @pytest.mark.parametrize("path", ["", "1", "01/", "01.8", "zz", "01/00/", "../00"])
    def test_wrong(self, path: str) -> None:
        with pytest.raises(ShimError, match="devicePath"):
            interface_at(path)


class TestCommands:
    async def test_output_and_status(self, client: Client) -> None:
        assert await sh(client, "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
        assert await sh(client, "kill -9 $$") == (128 + signal.SIGKILL, b"", b"")
        assert await sh(client, 'echo "$A $PWD"', env=["A=1 2"], cwd="/usr") == (0, b"1 2 /usr\n", b"")
        assert await sh(client, "cat") == (0, b"", b"")

    async def test_stdin(self, client: Client) -> None:
        data = os.urandom(1 << 20)
        command = await start(client, "cat", stdin=True)

        async def feed() -> None:
            await call(client, "WriteStdin", WriteStdinRequest(command_id=command, data=data))
            await call(client, "CloseStdin", CloseStdinRequest(command_id=command))

        feeding = asyncio.create_task(feed())
        assert await finish(client, command) == (0, data, b"")
        await feeding

    async def test_a_command_that_does_not_read(self, client: Client) -> None:
        command = await start(client, "sh", "-c", "exec <&-; echo closed; sleep 60", stdin=True)
        read_one = ReadOutputRequest(command_id=command, stream=STDOUT, len=100)
        assert (await call(client, "ReadOutput", read_one)).data == b"closed\n"
        request = WriteStdinRequest(command_id=command, data=b"x")
        assert (await refused(client, "WriteStdin", request))[0] == "failed-precondition"
        await call(client, "KillCommand", KillCommandRequest(command_id=command, signal=signal.SIGTERM))
        assert (await finish(client, command))[0] == 128 + signal.SIGTERM

    async def test_output_that_nobody_takes_stops_the_command(self, client: Client) -> None:
        command = await start(client, "sh", "-c", "head -c 1000000 /dev/zero; echo done >&2")
        with pytest.raises(ShimError, match="within"):
            await call(client, "ReadOutput", ReadOutputRequest(command_id=command, stream=STDERR, len=9), 0.3)
        assert len(await read(client, command, STDOUT)) == 1_000_000
        assert await finish(client, command) == (0, b"", b"done\n")

    async def test_killing_takes_the_whole_group(self, client: Client) -> None:
        command = await start(client, "sh", "-c", "sleep 60 & sleep 60")
        await call(client, "KillCommand", KillCommandRequest(command_id=command, signal=signal.SIGKILL))
        assert await finish(client, command) == (128 + signal.SIGKILL, b"", b"")

    async def test_killing_takes_what_a_command_has_left_behind(self, client: Client) -> None:
        command = await start(client, "sh", "-c", "sleep 60 & echo $!")
        request = ReadOutputRequest(command_id=command, stream=STDOUT, len=100)
        pid = int((await call(client, "ReadOutput", request)).data)
        assert (await call(client, "WaitCommand", WaitCommandRequest(command_id=command))).status == 0
        await call(client, "KillCommand", KillCommandRequest(command_id=command, signal=signal.SIGKILL))
        await gone(pid)

    @pytest.mark.parametrize(
        ("request_", "code", "message"),
        [
            (StartCommandRequest(), "invalid-argument", "argv: no command given"),
            (StartCommandRequest(argv=["nonesuch"]), "not-found", "nonesuch: command not found"),
            (StartCommandRequest(argv=["/none/such"]), "not-found", "/none/such: No such file or directory"),
            (
                StartCommandRequest(argv=["/etc/passwd"]),
                "permission-denied",
                "/etc/passwd: Permission denied",
            ),
            (
                StartCommandRequest(argv=["ls"], cwd="/none"),
                "not-found",
                "cwd: /none: No such file or directory",
            ),
            (StartCommandRequest(argv=["ls"], env=["A"]), "invalid-argument", "env: A is not NAME=value"),
            (StartCommandRequest(argv=["a\0b"]), "invalid-argument", "argv, env or cwd: embedded null byte"),
        ],
    )
    async def test_what_cannot_run(
        self, client: Client, request_: StartCommandRequest, code: str, message: str
    ) -> None:
        assert await refused(client, "StartCommand", request_) == (code, message)

    async def test_a_command_is_forgotten_when_it_is_done(self, client: Client) -> None:
        command = await start(client, "true")
        await finish(client, command)
        request = WaitCommandRequest(command_id=command)
        assert await refused(client, "WaitCommand", request) == (
            "not-found",
            f"command_id: there is no command {command}",
        )

    async def test_wrong_requests(self, client: Client) -> None:
        command = await start(client, "sleep", "60")
        kill = KillCommandRequest(command_id=command, signal=65)
        assert (await refused(client, "KillCommand", kill))[0] == "invalid-argument"
        write = WriteStdinRequest(command_id=command)
        assert (await refused(client, "WriteStdin", write))[0] == "failed-precondition"
        with_no_stream = ReadOutputRequest(command_id=command, len=1)
        assert (await refused(client, "ReadOutput", with_no_stream))[0] == "invalid-argument"

    async def test_a_closed_connections_commands_are_killed(self, client: Client) -> None:
        async with await Client.connect(client.name) as other:
            command = await start(other, "sh", "-c", "echo $$; exec sleep 60")
            request = ReadOutputRequest(command_id=command, stream=STDOUT, len=100)
            pid = int((await call(other, "ReadOutput", request)).data)
        await gone(pid)


# Generic netlink's CTRL_CMD_GETFAMILY, dumped: every kernel answers with some kilobytes.
FAMILIES = struct.pack("=IHHIIBBH", 20, 0x10, 0x301, 1, 0, 3, 2, 0)
GENERIC = 16


def deflated(data: bytes) -> bytes:
    """As the shim sends what is large."""
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflate.compress(data) + deflate.flush()


class TestRelays:
    async def test_answers_come_in_pieces(self, client: Client) -> None:
        whole = RelayNetlinkRequest(protocol=GENERIC, messages=[FAMILIES])
        once = (await call(client, "RelayNetlink", whole)).data
        count = 3 * RELAY_PIECE // len(once)
        answer = await call(
            client, "RelayNetlink", RelayNetlinkRequest(protocol=GENERIC, messages=[FAMILIES] * count)
        )
        pieces = [answer.data]
        while answer.relay_id:
            assert len(answer.data) >= RELAY_PIECE
            answer = await call(client, "RelayNetlink", RelayNetlinkRequest(relay_id=answer.relay_id))
            pieces.append(answer.data)
        assert (len(pieces) > 2, b"".join(pieces)) == (True, once * count)

    async def test_a_large_message_comes_deflated(self, client: Client) -> None:
        whole = RelayNetlinkRequest(protocol=GENERIC, messages=[FAMILIES])
        packed = RelayNetlinkRequest(protocol=GENERIC, deflated=deflated(FAMILIES))
        assert await call(client, "RelayNetlink", packed) == await call(client, "RelayNetlink", whole)

    async def test_what_nobody_takes_gives_way(self, client: Client) -> None:
        """Callers that went away in the middle must not use up what others need."""
        many = RelayNetlinkRequest(protocol=GENERIC, messages=[FAMILIES] * 1000)
        ids = [(await call(client, "RelayNetlink", many)).relay_id for _ in range(MAX_RELAYS + 3)]
        assert all(ids)
        for number in ids[:3]:
            code, text = await refused(client, "RelayNetlink", RelayNetlinkRequest(relay_id=number))
            assert (code, text) == ("invalid-argument", f"relay_id: {number} is none that has more to tell")
        for number in ids[3:]:
            assert (await call(client, "RelayNetlink", RelayNetlinkRequest(relay_id=number))).data

    async def test_only_what_is_needed_is_relayed(self, client: Client) -> None:
        for method, request in (
            ("RelayNetlink", RelayNetlinkRequest(protocol=0, messages=[FAMILIES])),
            ("RelayNetlink", RelayNetlinkRequest(protocol=GENERIC, deflated=b"not deflated")),
            ("RelayNetlink", RelayNetlinkRequest(protocol=GENERIC, deflated=deflated(b"cut" * 100)[:-4])),
            ("RelayNetlink", RelayNetlinkRequest(protocol=GENERIC, deflated=deflated(bytes(1 << 28)))),
            ("ReadTable", ReadTableRequest(name="../shadow")),
            ("CountTable", CountTableRequest(name="/etc/shadow")),
        ):
            code, _ = await refused(client, method, request)
            assert code == "invalid-argument"

    async def test_a_file_that_is_not_there_says_nothing(self, client: Client) -> None:
        assert (await call(client, "CountTable", CountTableRequest(name="ip_vs"))).lines == 0
        answer = await call(client, "ReadTable", ReadTableRequest(name="ip_vs"))
        assert (answer.data, answer.relay_id) == (b"", 0)
        assert b"localhost" in (await call(client, "ReadTable", ReadTableRequest(name="hosts"))).data
