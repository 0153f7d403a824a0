"""kata-ipvs's commands on a real guest, whose own ipvsadm is the witness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kata_shim.contract.ipvs import MAX_RULES
from tests.support import Guest, Result, Runtime
from tests.system.ipvs import DONE, TABLE, many, saved
from tests.system.network import done, refused


@pytest.fixture
def guest(ipvs_guest: Guest) -> Guest:
    """The shared sandbox with an empty table."""
    return ipvs_guest


HEAD = (
    "IP Virtual Server version 1.2.1 (size=4096)\n"
    "Prot LocalAddress:Port Scheduler Flags\n"
    "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n"
)
WEB = "--tcp-service 172.17.0.7:80"


def test_the_how_to(guest: Guest) -> None:
    """Its ten examples in their order, each as it stands there."""
    add = f"--add-service {WEB} --scheduler rr --persistent"
    assert guest.ipvsadm(f"{add} 3000") == DONE
    assert saved(guest) == ["-A -t 172.17.0.7:80 -s rr -p 3000"]
    assert guest.ipvsadm(f"--edit-service {WEB} --scheduler rr --persistent 5000") == DONE
    assert saved(guest) == ["-A -t 172.17.0.7:80 -s rr -p 5000"]
    assert guest.ipvsadm(f"--delete-service {WEB}") == DONE
    assert saved(guest) == []
    assert guest.ipvsadm(f"{add} 3000") == DONE
    assert guest.ipvsadm(f"--add-server {WEB} --real-server 172.17.0.4:80 --weight 100") == DONE
    assert saved(guest)[1:] == ["-a -t 172.17.0.7:80 -r 172.17.0.4:80 -m -w 100"]
    assert guest.ipvsadm(f"--edit-server {WEB} --real-server 172.17.0.4:80 --weight 200") == DONE
    assert saved(guest)[1:] == ["-a -t 172.17.0.7:80 -r 172.17.0.4:80 -m -w 200"]
    assert guest.ipvsadm("--list") == Result(
        0,
        f"{HEAD}TCP  172.17.0.7:80 rr persistent 3000\n"
        "  -> 172.17.0.4:80                Masq    200    0          0         \n",
        "",
    )
    assert guest.ipvsadm(f"--delete-server {WEB} --real-server 172.17.0.4:80") == DONE
    assert guest.ipvsadm(f"--delete-service {WEB}") == DONE
    rules = (
        "-A -t 10.10.11.12:100 -s rr -p  3000\n"
        "-a -t 10.10.11.12:100 -r  172.16.0.1:80 -m\n"
        "-a -t 10.10.11.12:100 -r  172.16.0.1:81 -m\n"
        "-a -t 10.10.11.12:100 -r 172.16.0.1:82  -m\n"
    )
    assert guest.restore(rules) == DONE
    assert saved(guest) == [
        "-A -t 10.10.11.12:100 -s rr -p 3000",
        *(f"-a -t 10.10.11.12:100 -r 172.16.0.1:{port} -m -w 1" for port in (80, 81, 82)),
    ]
    assert guest.cleanup("--orig-dst 172.17.0.4 --protonum tcp") == done("0 flow entries have been deleted.")
    assert guest.ipvsadm("--set 100 100 200") == DONE
    assert guest.run("ipvsadm", "-L", "--timeout").stdout == "Timeout (tcp tcpfin udp): 100 100 200\n"


def test_flags_may_stand_behind_the_id(guest: Guest) -> None:
    words = ("--parameters", f"-A -t [fd00::7]:80 -s {'sh'} -p 60")
    assert guest.runtime("kata-ipvs", "ipvsadm", guest.id, *words) == DONE
    assert saved(guest) == ["-A -t [fd00::7]:80 -s sh -p 60"]


def test_lists_are_those_of_the_guests_own_ipvsadm(guest: Guest) -> None:
    """Whoever made the table."""
    assert guest.run("ipvsadm", "-R", stdin=TABLE.strip().encode() + b"\n").status == 0
    for words in ("-L", "-Ln", "-L -n -t 10.0.0.1:80", "--list -u [fd00::1]:53"):
        theirs = guest.run("ipvsadm", *words.split())
        assert (guest.ipvsadm(words), len(theirs.stdout.splitlines()) > 3) == (theirs, True)


def test_an_empty_list(guest: Guest) -> None:
    assert guest.ipvsadm("-L") == Result(0, HEAD, "")


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (f"-A {WEB} -s rr -p 1", "Service already exists"),
        ("-E -t 172.17.0.8:80 -s rr -p 1", "No such service"),
        ("-D -t 172.17.0.8:80", "No such service"),
        ("-L -t 172.17.0.8:80", "No such service"),
        ("-a -t 172.17.0.8:80 -r 172.17.0.4:80", "Service not defined"),
        ("-e -t 172.17.0.8:80 -r 172.17.0.4:80", "Service not defined"),
        ("-d -t 172.17.0.8:80 -r 172.17.0.4:80", "Service not defined"),
        (f"-a {WEB} -r 172.17.0.4:80", "Destination already exists"),
        (f"-e {WEB} -r 172.17.0.5:80", "No such destination"),
        (f"-d {WEB} -r 172.17.0.5:80", "No such destination"),
        (
            f"-a {WEB} -r 224.0.0.1:80",
            "Invalid operation.  Possibly wrong module version, address not unicast, ...",
        ),
    ],
)
def test_the_kernels_refusals_are_in_the_words_of_ipvsadm(guest: Guest, parameters: str, reason: str) -> None:
    assert guest.restore(f"-A {WEB} -s rr -p 3000\n-a {WEB} -r 172.17.0.4:80 -m\n") == DONE
    before = saved(guest)
    assert guest.ipvsadm(parameters) == refused(reason)
    assert saved(guest) == before


def test_a_wrong_rule_applies_nothing(guest: Guest) -> None:
    assert guest.ipvsadm("-C") == refused(
        '"-C": unknown option; use --dialect ipvsadm for the whole language'
    )
    assert guest.restore(f"{many(3)}-A -t 10.0.0.1:80 -s rr\n{many(3)}") == refused(
        "line 13: persistent: missing; it must be within 1..2678400"
    )
    assert saved(guest) == []


@pytest.mark.parametrize("services", [1, 400])
def test_a_rule_that_the_kernel_refuses_is_named_and_nothing_stays(guest: Guest, services: int) -> None:
    """Also where whole messages have been sent before it and after it."""
    rules = many(services)
    wrong = f"{rules}# again\n-A -t 10.10.0.0:100 -s rr -p 3000\n{many(services + 1)[len(rules) :]}"
    line = len(rules.splitlines()) + 2
    assert guest.restore(wrong) == refused(f"line {line}: Service already exists")
    assert saved(guest) == []
    assert guest.restore(rules) == DONE


def test_restoring_needs_an_empty_table(guest: Guest) -> None:
    assert guest.restore(many(1)) == DONE
    before = saved(guest)
    assert guest.restore(many(2)) == refused("the guest has IPVS rules (4); delete them before restoring")
    assert saved(guest) == before


def test_files_are_restored_as_stdin_is(guest: Guest, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text(many(2))
    assert guest.runtime("kata-ipvs", "ipvsadm", "--restore", str(rules), guest.id) == DONE
    assert len(saved(guest)) == 8
    missing = tmp_path / "missing"
    assert guest.runtime("kata-ipvs", "ipvsadm", "--restore", str(missing), guest.id) == refused(
        f"kata-runtime: {missing}: No such file or directory"
    )
    rules.write_bytes(b"# one\n-A \xff\n")
    assert guest.runtime("kata-ipvs", "ipvsadm", "--restore", str(rules), guest.id) == refused(
        f"{rules}:2: byte 0xff is not UTF-8"
    )
    assert guest.restore("# none\n\n") == refused("rules: there are none to restore")


def test_the_documented_limit(guest: Guest) -> None:
    """20,000 services and servers, counted by what the kernel has; one more is refused, whoever asks how."""
    rules = many(MAX_RULES // 4)
    assert guest.restore(f"{rules}-a -t 10.10.0.0:100 -r 172.16.0.1:90 -m\n") == refused(
        f"line {MAX_RULES + 1}: more than {MAX_RULES} rules, services and servers, which is the limit"
    )
    assert saved(guest) == []
    assert guest.restore(rules) == DONE
    assert len(saved(guest)) == MAX_RULES
    full = refused(f"the guest has {MAX_RULES} IPVS rules; {MAX_RULES} are the limit")
    assert guest.ipvsadm(f"-A {WEB} -s rr -p 1") == full
    assert guest.ipvsadm("-a -t 10.10.0.0:100 -r 172.16.0.1:90") == full
    assert guest.run("ipvsadm", "-d", "-t", "10.10.0.0:100", "-r", "172.16.0.1:80").status == 0
    assert guest.ipvsadm("-a -t 10.10.0.0:100 -r 172.16.0.1:90") == DONE


LINES = """
-A -t 10.0.0.1:80 -s rr -p 3000
-A -t 10.0.0.1:80
-A -t localhost:80 -s bogus
-A -t localhost:80 -s wrr
-A -u [fd00::1]:53 -s sh -b sh-fallback,sh-port -o -p 60 -M 64 --pe sip
-A --sctp-service 10.0.0.2:0 -s mh -p -M 255.255.255.0 -b mh-port
-A -f 7 -6 -s lc -b flag-1,flag-3
-A -f 7
-A -f 0
-E -t 10.0.0.1:80 -s wlc
-E -t 10.0.0.9:80
-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 5 -x 100 -y 50
-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m
-a -t 10.0.0.1:80 -r localhost -g
-a -t 10.0.0.1:80 -r [fd00:1::1]:80 -i --tun-type gue --tun-port 6080 --tun-remcsum
-a -t 10.0.0.1:80 -r 192.168.1.4 -i --tun-type gre --tun-csum -w 2147483647
-a -t 10.0.0.1:80 -r 192.168.1.5 -i --tun-type gue
-a -f 7 -6 -r [fd00:1::2]:0 -m
-a -f 9 -r 10.0.0.9 -m
-e -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 0 -x 100 -y 50
-e -t 10.0.0.1:80 -r 192.168.1.9:8080 -m -w 0
-d -t 10.0.0.1:80 -r 192.168.1.9
-d -t 10.0.0.1:80 -r localhost
--set 100 0 2678400
--start-daemon master --mcast-interface lo --syncid 3
--start-daemon master --mcast-interface lo
--start-daemon backup --mcast-interface lo --mcast-group 224.0.0.99 --mcast-port 9000 --mcast-ttl 3
--start-daemon master --mcast-interface nosuch
-L
-Ln
-Ln --stats
-Ln --stats --exact
-Ln --rate
-Ln --thresholds
-Ln --persistent-conn
-Ln --tun-info
-Ln --nosort
-L -t localhost:80
-L -t 10.0.0.9:80
-L --timeout
-L --daemon
-Lc
-Lnc --persistent-conn
-L --timeout --stats
-S -n
-S
-Z
-Z -t 10.0.0.1:80
-Z -t 10.0.0.9:80
-D -f 7 -6
-D -f 8
--stop-daemon master
--stop-daemon backup
--stop-daemon backup
-h
-v
-A -q
bogus
-C
-Ln
"""


def test_the_whole_language_does_what_ipvsadm_does(guest: Guest) -> None:
    """Each line by our command, and by the guest's own ipvsadm on a table that came about in the same way."""
    lines = LINES.strip().splitlines()
    theirs = [guest.run("ipvsadm", *line.split()) for line in lines]
    assert guest.run("ipvsadm", "--set", "900", "120", "300").status == 0
    for line, expected in zip(lines, theirs, strict=True):
        given = guest.ipvsadm(line, "--dialect", "ipvsadm")
        if line.startswith("-S"):  # which keeps the thresholds
            given = replace(given, stdout=given.stdout.replace(" -x 100 -y 50", ""))
        assert (line, given) == (line, expected)


def test_restore_is_no_parameter(guest: Guest) -> None:
    assert guest.ipvsadm("-R", "--dialect", "ipvsadm") == Result(
        2, "", "rules are restored by --restore FILE or --restore -\n"
    )


def test_an_unknown_dialect(guest: Guest) -> None:
    assert guest.ipvsadm("-L", "--dialect", "iptables") == refused(
        'dialect: "iptables" is neither documented nor ipvsadm'
    )


@pytest.mark.parametrize(
    "words",
    [
        ("kata-ipvs",),
        ("kata-ipvs", "ipvs", "one"),
        ("kata-ipvs", "ipvsadm", "one"),
        ("kata-ipvs", "ipvsadm", "--parameters", "-L", "--restore", "-", "one"),
        ("kata-ipvs", "ipvsadm", "--parameters", "-L", "one", "two"),
        ("kata-ipvs", "cleanup", "--restore", "-", "one"),
        ("kata-ipvs", "ipvsadm", "--json", "--restore", "-", "one"),
        ("kata-ipvs", "ipvsadm", "--dry-run", "--parameters", "-L", "one"),
        ("kata-ipvs", "ipvsadm", "--dialect", "ipvsadm", "--replace", "-", "one"),
        ("kata-ipvs", "ipvsadm", "--parameter", "-L", "one"),
    ],
)
def test_a_wrong_command_line_is_status_2(runtime: Runtime, words: tuple[str, ...]) -> None:
    answer = runtime(*words)
    assert (answer.status, answer.stdout) == (2, "null\n")
    assert answer.stderr.startswith("kata-runtime kata-ipvs: ")


def test_an_unknown_sandbox(runtime: Runtime) -> None:
    assert runtime("kata-ipvs", "ipvsadm", "--parameters", "-L", "nobody") == refused(
        "no such container ID (nobody)"
    )
    assert runtime("kata-ipvs", "cleanup", "--parameters", "-d 10.0.0.1 -p tcp") == refused(
        "Missing container ID"
    )
