"""netconf/ against the real kernel, in a network namespace of each test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from kata_shim.errors import ShimError
from kata_shim.netconf import address, link, neighbour, route
from kata_shim.netconf.link import Link, Monitor
from kata_shim.netconf.netlink import KernelError, Netlink
from tests.component.netns import MAC, ip, network_namespace

pytestmark = pytest.mark.quick

SOON = 10.0  # seconds; far more than anything here takes


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


@pytest.fixture
async def netlink(namespace: None) -> AsyncIterator[Netlink]:
    opened = Netlink()
    yield opened
    opened.close()
    await asyncio.sleep(0)  # the transport closes its socket in the next turn of the loop


async def nic(netlink: Netlink, name: str = "nic") -> Link:
    found = await link.find(netlink, name)
    assert found is not None
    return found


async def up(netlink: Netlink, *addresses: str) -> Link:
    """Return the NIC, up and with these addresses."""
    found = await link.ensure(netlink, await nic(netlink))
    wanted = [address.parse(*one.split("/")) for one in addresses]
    await address.ensure(netlink, found.index, wanted)
    return found


def dests(routes: list[route.Route]) -> list[str]:
    return [str(one) for one in routes]


class TestLink:
    async def test_find(self, netlink: Netlink) -> None:
        found = await nic(netlink)
        assert (found.name, found.mac, found.mtu, found.up) == ("nic", MAC, 1500, False)
        assert await link.find(netlink, index=found.index) == found
        assert await link.find(netlink, "nobody") is None
        assert link.name_of(found.index) == "nic"
        assert link.name_of(4711) == ""
        with pytest.raises(ShimError, match=r"^device nobody: No such device$") as error:
            link.index_of("nobody")
        assert error.value.code == "not-found"

    async def test_ensure_brings_name_mtu_and_state_at_once(self, netlink: Netlink) -> None:
        found = await nic(netlink)
        changed = await link.ensure(netlink, found, name="eth-test", mtu=1400)
        assert changed == await nic(netlink, "eth-test")
        assert (changed.mtu, changed.up) == (1400, True)
        assert await link.ensure(netlink, changed, name="eth-test", mtu=1400) is changed

    async def test_a_link_that_is_up_is_renamed(self, netlink: Netlink) -> None:
        found = await up(netlink)
        assert await link.ensure(netlink, found, name="other") == await nic(netlink, "other")

    @pytest.mark.parametrize(
        ("wanted", "code", "words"),
        [
            (
                {"mtu": 70000},
                "invalid-argument",
                "mtu 70000, up: mtu greater than device maximum (Invalid argument)",
            ),
            ({"mtu": 1300, "name": "peer"}, "already-exists", "mtu 1300, name peer, up: File exists"),
            ({"name": "a/b"}, "invalid-argument", "name a/b, up: Invalid argument"),
        ],
    )
    async def test_a_refused_change_leaves_the_link_as_it_was(
        self, netlink: Netlink, wanted: dict[str, object], code: str, words: str
    ) -> None:
        found = await nic(netlink)
        with pytest.raises(KernelError) as error:
            await link.ensure(netlink, found, **wanted)  # type: ignore[arg-type]
        assert (error.value.code, error.value.message) == (code, f"link nic: {words}")
        assert await nic(netlink) == found

    async def test_a_link_that_is_gone(self, netlink: Netlink) -> None:
        found = await nic(netlink)
        ip("link del nic")
        with pytest.raises(KernelError, match="No such device") as error:
            await link.ensure(netlink, found)
        assert error.value.code == "not-found"

    async def test_many_at_once_on_one_socket(self, netlink: Netlink) -> None:
        lists = await asyncio.gather(*(link.list_all(netlink) for _ in range(20)))
        assert all({one.name for one in links} == {"lo", "nic", "peer"} for links in lists)


class TestMonitor:
    async def test_it_tells_of_a_new_link_and_of_no_other(self, netlink: Netlink) -> None:
        monitor = Monitor()
        try:
            with monitor.watch("02:42:20:6f:a3:07") as events, monitor.watch("02:42:20:6f:a3:08") as others:
                ip("link add new7 address 02:42:20:6f:a3:07 type veth peer name peer7")
                async with asyncio.timeout(SOON):
                    event = await events.get()
                assert event == await nic(netlink, "new7")
                assert others.empty()
        finally:
            monitor.close()

    async def test_events_lost_are_told(self, netlink: Netlink) -> None:
        monitor = Monitor()
        monitor._socket.setsockopt(1, 8, 1)  # SOL_SOCKET, SO_RCVBUF: the least the kernel allows
        try:
            with monitor.watch("02:42:20:6f:a3:07") as events:
                for i in range(5):
                    ip(f"link add many{i} type veth peer name others{i}")
                async with asyncio.timeout(SOON):
                    assert await events.get() is None
        finally:
            monitor.close()


class TestAddress:
    async def test_exactly_these(self, netlink: Netlink) -> None:
        found = await up(netlink, "10.0.0.2/8", "fd00::2/64")
        for wanted in (["10.0.0.3/8", "fd00::2/64"], ["10.0.0.3/16", "fd00::3/64", "fd00::4/64"], []):
            addresses = [address.parse(*one.split("/")) for one in wanted]
            for _ in range(2):
                await address.ensure(netlink, found.index, addresses)
                present = await address.list_all(netlink, found.index)
                assert {str(one) for _, one in present} == set(wanted)

    async def test_the_connected_route_is_the_kernels(self, netlink: Netlink) -> None:
        found = await link.ensure(netlink, await nic(netlink))
        await address.ensure(netlink, found.index, [address.parse("172.16.0.3", "16")], fresh=True)
        assert ip("route").strip() == "172.16.0.0/16 dev nic proto kernel scope link src 172.16.0.3"
        assert "brd 172.16.255.255" in ip("-4 addr show dev nic")

    async def test_an_ipv6_address_is_usable_at_once(self, netlink: Netlink) -> None:
        await up(netlink, "fd00::2/64")
        assert "tentative" not in ip("-6 addr show dev nic to fd00::/64")

    async def test_all_or_nothing(self, netlink: Netlink) -> None:
        found = await up(netlink, "10.0.0.2/8")
        wanted = [address.parse("10.0.0.3", 8), address.parse("ff02::5", 64)]
        with pytest.raises(KernelError, match=r"add address ff02::5/64: .*Cannot assign requested address"):
            await address.ensure(netlink, found.index, wanted)
        assert [str(one) for _, one in await address.list_all(netlink, found.index)] == ["10.0.0.2/8"]

    @pytest.mark.parametrize("text", ["10.0.0/8", "10.0.0.1/33", "fd00::1/x", "/8"])
    def test_not_an_address(self, text: str) -> None:
        with pytest.raises(ShimError, match="is not an IP address"):
            address.parse(*text.split("/"))

    async def test_delete_what_is_not_there(self, netlink: Netlink) -> None:
        found = await nic(netlink)
        with pytest.raises(KernelError) as error:
            await address.delete(netlink, found.index, address.parse("10.0.0.9", 8))
        assert error.value.code == "not-found"


class TestRoute:
    @pytest.fixture(autouse=True)
    async def _addresses(self, netlink: Netlink) -> None:
        await up(netlink, "10.0.0.2/8", "fd00::2/64")

    @pytest.mark.parametrize(
        ("dest", "gateway", "device", "shown"),
        [
            ("172.17.10.10/24", "10.0.0.1", "nic", "172.17.10.0/24 via 10.0.0.1 dev nic"),
            ("172.17.10.10", "", "nic", "172.17.10.10/32 dev nic"),
            ("default", "10.0.0.1", "nic", "default via 10.0.0.1 dev nic"),
            ("0.0.0.0/0", "10.0.0.1", "nic", "default via 10.0.0.1 dev nic"),
            ("13.0.0.0/8", "", "lo", "13.0.0.0/8 dev lo"),
            ("FD11::1/16", "fe80::1", "nic", "fd11::/16 via fe80::1 dev nic"),
            ("default", "fd00::1", "nic", "default via fd00::1 dev nic"),
        ],
    )
    async def test_add_twice_and_delete(
        self, netlink: Netlink, dest: str, gateway: str, device: str, shown: str
    ) -> None:
        before = await route.list_main(netlink)
        wanted = route.parse(dest, gateway, device)
        await route.add(netlink, wanted)
        assert set(dests(await route.list_main(netlink))) - set(dests(before)) == {shown}
        with pytest.raises(KernelError) as error:
            await route.add(netlink, wanted)
        assert (error.value.code, error.value.message) == ("already-exists", f"route {shown}: File exists")
        assert dests(await route.delete(netlink, dest, gateway, device)) == [shown]
        assert await route.list_main(netlink) == before

    @pytest.mark.parametrize(
        ("dest", "gateway", "device", "code", "words"),
        [
            (
                "12.0.0.0/8",
                "99.0.0.1",
                "nic",
                "failed-precondition",
                "Nexthop has invalid gateway (Network is unreachable)",
            ),
            ("fd12::/16", "fd99::1", "nic", "failed-precondition", "No route to host"),
            ("12.0.0.0/8", "", "nobody", "not-found", "device nobody: No such device"),
            ("fd12::/16", "fd00::2", "nic", "invalid-argument", "Gateway can not be a local address"),
        ],
    )
    async def test_the_kernels_refusal(
        self, netlink: Netlink, dest: str, gateway: str, device: str, code: str, words: str
    ) -> None:
        with pytest.raises(KernelError) as error:
            await route.add(netlink, route.parse(dest, gateway, device))
        assert error.value.code == code
        assert words in error.value.message

    async def test_a_link_that_is_down(self, netlink: Netlink) -> None:
        ip("link set nic down")
        with pytest.raises(KernelError, match=r"Device for nexthop is not up \(Network is down\)") as error:
            await route.add(netlink, route.parse("12.0.0.0/8", "", "nic"))
        assert error.value.code == "failed-precondition"

    @pytest.mark.parametrize(
        ("dest", "gateway", "words"),
        [
            ("1.2.3", "", "dest: 1.2.3 is not an IP address"),
            ("1.2.3.0/24", "1.2.3", "gateway: 1.2.3 is not an IP address"),
            ("1.2.3.0/24", "fd00::1", "gateway: fd00::1 is not of the same IP version as dest"),
        ],
    )
    def test_wrong_texts(self, dest: str, gateway: str, words: str) -> None:
        with pytest.raises(ShimError, match=words) as error:
            route.parse(dest, gateway, "nic")
        assert error.value.code == "invalid-argument"

    async def test_list_leaves_out_link_local_and_multicast(self, netlink: Netlink) -> None:
        ip("route add blackhole 50.0.0.0/8")
        assert "fe80::/64" in ip("-6 route show table all")
        listed = dests(await route.list_main(netlink))
        assert listed == ["10.0.0.0/8 dev nic", "50.0.0.0/8", "fd00::/64 dev nic"]

    async def test_delete_is_fuzzy(self, netlink: Netlink) -> None:
        for metric, gateway in ((1, "10.0.0.7"), (2, "10.0.0.8"), (3, "10.0.0.8")):
            ip(f"route add 20.0.0.0/8 metric {metric} via {gateway}")
        assert len(await route.delete(netlink, "20.1.2.3/8", "10.0.0.8")) == 2
        assert dests(await route.delete(netlink, "20.0.0.0/8")) == ["20.0.0.0/8 via 10.0.0.7 dev nic"]
        with pytest.raises(ShimError, match="no route of the main table matches") as error:
            await route.delete(netlink, "20.0.0.0/8")
        assert error.value.code == "not-found"

    async def test_delete_the_kernels_own(self, netlink: Netlink) -> None:
        assert dests(await route.delete(netlink, "10.0.0.0/8", device="nic")) == ["10.0.0.0/8 dev nic"]
        assert ip("-4 route") == ""

    async def test_default_means_both_ip_versions(self, netlink: Netlink) -> None:
        ip("route add default via 10.0.0.1")
        ip("-6 route add default via fd00::1")
        assert len(await route.delete(netlink, "0.0.0.0/0")) == 1
        ip("route add default via 10.0.0.1")
        assert len(await route.delete(netlink, "default")) == 2


class TestReplaceRoutes:
    OTHERS = (
        "route add 20.0.0.0/8 metric 5 mtu 1300 advmss 1000 proto static via 10.0.0.7",
        "route add 21.0.0.0/8 nexthop via 10.0.0.7 weight 2 nexthop via 10.0.0.8",
        "route add 22.0.0.0/8 via inet6 fd00::99 dev nic",
        "route add 23.0.0.0/8 via 10.0.0.7 src 10.0.0.2",
        "route add 24.0.0.1 via 99.0.0.1 dev nic onlink",
        "route add blackhole 50.0.0.0/8",
        "-6 route add fd22::/64 nexthop via fd00::77 nexthop via fd00::78",
        "-6 route add fd23::/64 via fd00::77 mtu 1300",
        "-6 route add default via fd00::1",
    )

    @pytest.fixture(autouse=True)
    async def _routes(self, netlink: Netlink) -> None:
        await up(netlink, "10.0.0.2/8", "fd00::2/64")
        for one in self.OTHERS:
            ip(one)

    @staticmethod
    def tables() -> list[str]:
        return sorted((ip("route") + ip("-6 route")).splitlines())

    async def test_exactly_these_whatever_their_order(self, netlink: Netlink) -> None:
        wanted = [
            route.parse("32.0.0.0/8", "30.0.0.1", "nic"),
            route.parse("30.0.0.0/8", "", "nic"),
            route.parse("default", "fd00::1", "nic"),
        ]
        for _ in range(2):
            assert await route.replace(netlink, wanted) == wanted
            listed = [one for one in await route.list_main(netlink) if not one.kernels]
            assert set(listed) == set(wanted)
        assert dests(await route.replace(netlink, [])) == []
        assert dests(await route.list_main(netlink)) == ["10.0.0.0/8 dev nic", "fd00::/64 dev nic"]

    async def test_what_is_there_is_not_touched(self, netlink: Netlink) -> None:
        await route.replace(netlink, [route.parse("20.0.0.0/8", "10.0.0.7", "nic")])
        assert "20.0.0.0/8 via 10.0.0.7 dev nic proto static metric 5 mtu 1300 advmss 1000" in ip("route")

    async def test_an_error_in_the_middle_puts_everything_back(self, netlink: Netlink) -> None:
        before = self.tables()
        wanted = [
            route.parse("30.0.0.0/8", "", "nic"),
            route.parse("31.0.0.0/8", "10.0.0.9", "nic"),
            route.parse("33.0.0.0/8", "77.0.0.1", "nic"),
        ]
        with pytest.raises(KernelError, match="Nexthop has invalid gateway"):
            await route.replace(netlink, wanted)
        assert self.tables() == before


async def test_neighbour(netlink: Netlink) -> None:
    found = await up(netlink, "10.0.0.2/8", "fd00::2/64")
    for one in ("10.0.0.9", "fd00::9"):
        for mac in ("02:00:00:00:00:01", "02:00:00:00:00:02"):
            await neighbour.ensure(netlink, found.index, one, mac)
        assert ip(f"neigh show {one}").split() == [
            one,
            "dev",
            "nic",
            "lladdr",
            "02:00:00:00:00:02",
            "PERMANENT",
        ]
    for wrong in (("10.0.0", "02:00:00:00:00:01"), ("10.0.0.9", "02:00"), ("10.0.0.9", "zz")):
        with pytest.raises(ShimError) as error:
            await neighbour.ensure(netlink, found.index, *wrong)
        assert error.value.code == "invalid-argument"
