"""What rules set by kata-ipvs do to real traffic: three servers share it, sessions outlive changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support import Guest, Result, Runtime
from tests.system.ipvs import DONE, ipvsadm_restore, replace_by
from tests.system.network import booted, done
from tests.system.traffic import SOURCES, SOURCES6, Client, Session, surrounded

WEB = "10.9.0.1:80"
ONE = SOURCES[0]


@pytest.fixture(scope="module")
def balancer(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A sandbox of these tests' own: it becomes a router."""
    with booted(runtime, tmp_path_factory.mktemp("traffic"), "balancer", shared_memory=True) as guest:
        yield guest


@pytest.fixture(scope="module")
def client(balancer: Guest) -> Iterator[Client]:
    """The client; behind the guest it finds three servers."""
    with surrounded(balancer) as client:
        yield client


@pytest.fixture
def guest(balancer: Guest, client: Client) -> Iterator[Guest]:
    """The sandbox with an empty table."""
    yield balancer
    assert balancer.ipvsadm("-C", "--dialect", "ipvsadm") == DONE


def rules(service: str, options: str, servers: str) -> str:
    """A service with each of three servers; `{}` stands for a server's number."""
    each = "".join(f"-a {service} -r {servers.format(number)}\n" for number in (1, 2, 3))
    return f"-A {service} {options}\n{each}"


def weigh(guest: Guest, number: int, weight: int) -> None:
    """Give one of WEB's servers a weight."""
    server = f"--tcp-service {WEB} --real-server 10.{number}.0.2:8080"
    assert guest.ipvsadm(f"--edit-server {server} --weight {weight}") == DONE


@pytest.mark.parametrize(
    ("service", "servers", "source"),
    [
        ("-t 10.9.0.1:80", "10.{}.0.2:8080 -m", ONE),
        ("-t 10.9.0.1:80", "10.{}.0.2:80 -g", ONE),
        ("-u 10.9.0.1:80", "10.{}.0.2:8080 -m", ONE),
        ("-t [fd09::1]:80", "[fd0{}::2]:8080 -m", SOURCES6[0]),
        ("-t [fd09::1]:80", "[fd0{}::2]:80 -g", SOURCES6[0]),
        ("-u [fd09::1]:80", "[fd0{}::2]:8080 -m", SOURCES6[0]),
    ],
)
def test_rr_takes_turns(guest: Guest, client: Client, service: str, servers: str, source: str) -> None:
    assert ipvsadm_restore(guest, rules(service, "-s rr", servers)) == DONE
    target = "fd09::1" if ":" in source else "10.9.0.1"
    visited = client.visit(target, 80, 12 * [source], "tcp" if service.startswith("-t") else "udp")
    assert (visited, set(visited)) == (4 * visited[:3], set("123"))


def test_wrr_goes_by_the_weights(guest: Guest, client: Client) -> None:
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s wrr", "10.{}.0.2:8080 -m")) == DONE
    weigh(guest, 1, 3)
    weigh(guest, 2, 2)
    visited = client.visit("10.9.0.1", 80, 24 * [ONE])
    assert Counter(visited) == {"1": 12, "2": 8, "3": 4}


def test_sh_goes_by_the_source(guest: Guest, client: Client) -> None:
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s sh", "10.{}.0.2:8080 -m")) == DONE
    visited = client.visit("10.9.0.1", 80, 3 * SOURCES)
    first = visited[: len(SOURCES)]
    assert (visited, set(first)) == (3 * first, set("123"))


def test_lc_goes_where_the_fewest_are(guest: Guest, client: Client) -> None:
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s lc", "10.{}.0.2:8080 -m")) == DONE
    sessions = [client.open("10.9.0.1", 80, ONE) for _ in range(9)]
    assert Counter(session.server for session in sessions) == {"1": 3, "2": 3, "3": 3}
    listed = guest.ipvsadm("-Ln").stdout
    active = re.findall(r"-> 10\.(\d)\.0\.2:8080 +Masq +1 +(\d+) ", listed)
    assert active == [(number, "3") for number in "123"]
    client.close(*sessions)


def test_persistence_keeps_a_client_at_its_server(guest: Guest, client: Client) -> None:
    """As the documents add services, one by one; clients are shared out by rr, each then stays."""
    service = f"--tcp-service {WEB}"
    assert guest.ipvsadm(f"--add-service {service} --scheduler rr --persistent 3000") == DONE
    for number in (1, 2, 3):
        assert guest.ipvsadm(f"--add-server {service} --real-server 10.{number}.0.2:8080 --weight 1") == DONE
    visited = client.visit("10.9.0.1", 80, 3 * SOURCES)
    first = visited[: len(SOURCES)]
    assert visited == 3 * first
    assert (first, set(first)) == (4 * first[:3], set("123"))
    # A server that is drained keeps its clients; others do not come to it.
    weigh(guest, int(first[0]), 0)
    assert client.visit("10.9.0.1", 80, SOURCES) == first
    assert guest.ipvsadm(f"--delete-server {service} --real-server 10.{first[0]}.0.2:8080") == DONE
    again = client.visit("10.9.0.1", 80, SOURCES)
    assert [now for was, now in zip(first, again, strict=True) if was != first[0]] == [
        was for was in first if was != first[0]
    ]
    assert set(again) == set("123") - {first[0]}


def opened(client: Client, source: str = ONE) -> dict[int, Session]:
    """A session with each server, by its number."""
    sessions = [client.open("10.9.0.1", 80, source) for _ in range(3)]
    found = {int(session.server): session for session in sessions}
    assert sorted(found) == [1, 2, 3]
    return found


def test_sessions_outlive_edit_server(guest: Guest, client: Client) -> None:
    """One whose server is drained, too; new ones go by the weights as they are then."""
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s wrr", "10.{}.0.2:8080 -m")) == DONE
    sessions = opened(client)
    for weights, shares in (((0, 2, 1), {"2": 8, "3": 4}), ((1, 0, 3), {"1": 3, "3": 9})):
        for number, weight in enumerate(weights, 1):
            weigh(guest, number, weight)
        assert [client.ask(sessions[number]) for number in (1, 2, 3)] == ["1", "2", "3"]
        assert Counter(client.visit("10.9.0.1", 80, 12 * [ONE])) == shares
        assert [client.ask(sessions[number]) for number in (1, 2, 3)] == ["1", "2", "3"]
    client.close(*sessions.values())


def test_a_session_waits_for_a_deleted_server(guest: Guest, client: Client) -> None:
    """The kernel drops its packets, lets the others' through, and goes on when the server is back."""
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s rr", "10.{}.0.2:8080 -m")) == DONE
    sessions = opened(client)
    server = f"--tcp-service {WEB} --real-server 10.2.0.2:8080"
    assert guest.ipvsadm(f"--delete-server {server}") == DONE
    client.say(sessions[2])
    assert [client.ask(sessions[number]) for number in (1, 3)] == ["1", "3"]
    assert Counter(client.visit("10.9.0.1", 80, 12 * [ONE])) == {"1": 6, "3": 6}
    assert client.heard(sessions[2]) is None
    assert guest.ipvsadm(f"--add-server {server}") == DONE
    assert client.hear(sessions[2]) == "2"
    client.close(*sessions.values())


def test_a_session_ends_with_its_server_where_the_guest_says_so(guest: Guest, client: Client) -> None:
    """The guest's expire_nodest_conn, which is off by default."""
    assert ipvsadm_restore(guest, rules(f"-t {WEB}", "-s rr", "10.{}.0.2:8080 -m")) == DONE
    sessions = opened(client)
    setting = "/proc/sys/net/ipv4/vs/expire_nodest_conn"
    assert guest.run("sh", "-c", f"echo 1 > {setting}") == DONE
    assert guest.ipvsadm(f"--delete-server --tcp-service {WEB} --real-server 10.2.0.2:8080") == DONE
    assert [client.ask(sessions[number]) for number in (1, 2, 3)] == ["1", "ECONNRESET", "3"]
    assert guest.run("sh", "-c", f"echo 0 > {setting}") == DONE
    client.close(sessions[1], sessions[3])


def test_sessions_outlive_a_replacement(guest: Guest, client: Client) -> None:
    """Where the table is brought to a file: those of servers that stay."""
    assert replace_by(guest, rules(f"-t {WEB}", "-s rr -p 60", "10.{}.0.2:8080 -m")).status == 0
    sessions = [client.open("10.9.0.1", 80, source) for source in SOURCES[:3]]
    table = rules(f"-t {WEB}", "-s wrr -p 90", "10.{}.0.2:8080 -m -w 5")
    assert replace_by(guest, re.sub("-a .* 10.2.0.2:.*\n", "", table)).status == 0
    stay = [session for session in sessions if session.server != "2"]
    assert [client.ask(session) for session in stay] == [session.server for session in stay]
    assert len(stay) == 2
    client.close(*stay)


# What the list of connections tells of those to port 81, but for the time that is left to each.
LISTED = re.compile(r"(?m)^(\w+) +\d\d:\d\d +(.* \S+:81 .*)$")


def both(guest: Guest, words: str) -> tuple[Result, Result]:
    """What our command answers, and the guest's own ipvsadm."""
    return guest.ipvsadm(words, "--dialect", "ipvsadm"), guest.run("ipvsadm", *words.split())


def test_connections_are_listed_as_by_the_guests_own_ipvsadm(guest: Guest, client: Client) -> None:
    """Those of other tests may end meanwhile."""
    services = (
        rules("-t 10.9.0.1:81", "-s rr -p 60", "10.{}.0.2:8080 -m")
        + rules("-u 10.9.0.1:81", "-s rr", "10.{}.0.2:8080 -m")
        + rules("-t [fd09::1]:81", "-s rr", "[fd0{}::2]:81 -g")
    )
    assert ipvsadm_restore(guest, services) == DONE
    session = client.open("fd09::1", 81, SOURCES6[0])
    client.visit("10.9.0.1", 81, SOURCES[:4])
    client.visit("10.9.0.1", 81, SOURCES[:2], "udp")
    for words in ("-Lnc", "-Lnc --persistent-conn"):
        ours, theirs = (LISTED.findall(answer.stdout) for answer in both(guest, words))
        assert (ours, len(ours)) == (theirs, 4 + 4 + 2 + 1)  # four by a template each
    listing, earlier = "-Ln --stats --exact", Result(1, "", "")
    # The kernel sums its counters up every two seconds; only between two like answers is a third the same.
    stats, expected = both(guest, listing)
    while stats != earlier:
        earlier = stats
        _, expected = both(guest, listing)
        stats, _ = both(guest, listing)
    assert (stats, len(stats.stdout.splitlines())) == (expected, 3 + 3 * 4)
    client.close(session)


Flow = tuple[str, str, str]  # protocol, original destination, its port


@pytest.fixture
def tracked(guest: Guest) -> Iterator[Guest]:
    """The sandbox with two services, IPv4 and IPv6, whose connections are in conntrack as all others are.

    It tracks any at all while there is a service at port 21: IPVS needs that for FTP.
    """
    table = "".join(
        rules(f"{kind} {address}", "-s rr", server)
        for address, server in (("10.9.0.1:80", "10.{}.0.2:8080 -m"), ("[fd09::1]:80", "[fd0{}::2]:8080 -m"))
        for kind in ("-t", "-u")
    )
    for virtual, server in (("10.9.0.1", "10.1.0.2"), ("[fd09::1]", "[fd01::2]")):
        table += f"-A -t {virtual}:21 -s rr\n-a -t {virtual}:21 -r {server}:21 -m\n"
    assert ipvsadm_restore(guest, table) == DONE
    assert guest.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/vs/conntrack") == DONE
    assert guest.run("sh", "-c", "echo 600 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout") == DONE
    yield guest
    assert guest.run("sh", "-c", "echo 0 > /proc/sys/net/ipv4/vs/conntrack") == DONE
    assert guest.run("conntrack", "-F").status == 0


def flows(guest: Guest) -> Counter[Flow]:
    """What the guest's own conntrack lists."""
    found: Counter[Flow] = Counter()
    for family in ("ipv4", "ipv6"):
        for line in guest.run("conntrack", "-L", "-f", family).stdout.splitlines():
            protocol, target, port = re.findall(r"^\w+|(?<= dst=)\S+|(?<= dport=)\d+", line)[:3]
            found[protocol, target, port] += 1
    return found


def test_cleanup_deletes_what_was_first_sent_there(tracked: Guest, client: Client) -> None:
    """To a virtual address and to servers, by all ports; no other protocol, and nothing that they answer."""
    made: Counter[Flow] = Counter()
    numbers = iter(range(1, 20))
    for virtual, one, two, sources in (
        ("10.9.0.1", "10.1.0.2", "10.2.0.2", SOURCES),
        ("fd09::1", "fd01::2", "fd02::2", SOURCES6),
    ):
        for target, port in ((virtual, 80), (one, 80), (one, 8080), (two, 80)):
            for protocol in ("tcp", "udp"):
                made[protocol, target, str(port)] = number = next(numbers)
                client.visit(target, port, number * [sources[number % 12]], protocol)
    assert flows(tracked) == made
    for target, protocol in (
        ("10.9.0.1", "tcp"),
        ("10.1.0.2", "tcp"),
        ("10.1.0.2", "udp"),
        ("10.9.0.9", "udp"),
        ("fd09::1", "udp"),
        ("fd01::2", "tcp"),
        ("fd09::9", "tcp"),
    ):
        gone = [flow for flow in made if flow[:2] == (protocol, target)]
        count = sum(made.pop(flow) for flow in gone)
        answer = tracked.cleanup(f"--orig-dst {target} --protonum {protocol}")
        assert answer == done(f"{count} flow entries have been deleted.")
        again = tracked.cleanup(f"-p {protocol} -d {target}")
        assert again == done("0 flow entries have been deleted.")
        assert flows(tracked) == made


def test_sessions_outlive_cleanup(tracked: Guest, client: Client) -> None:
    """The guest finds them again by their next packet."""
    sessions = opened(client)
    for _ in range(2):
        answer = tracked.cleanup("--orig-dst 10.9.0.1 --protonum tcp")
        assert answer == done("3 flow entries have been deleted.")
        assert flows(tracked) == {}
        assert [client.ask(sessions[number]) for number in (1, 2, 3)] == ["1", "2", "3"]
        assert flows(tracked) == {("tcp", "10.9.0.1", "80"): 3}
    client.close(*sessions.values())
