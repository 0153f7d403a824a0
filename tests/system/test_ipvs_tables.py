"""What changes a guest's whole IPVS table is whole or leaves the table before it, whoever is killed."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kata_shim.sandbox.guest_kernel import CHUNK
from tests.started import PATIENCE, kill, shims
from tests.support import Guest, Result, Runtime
from tests.system.ipvs import DONE, ODD, TABLE, ipvsadm_restore, many, replace_by, saved
from tests.system.network import booted, refused


@pytest.fixture
def guest(ipvs_guest: Guest) -> Guest:
    """The shared sandbox with an empty table."""
    return ipvs_guest


def test_any_rules_are_restored_on_top_of_others(guest: Guest) -> None:
    assert ipvsadm_restore(guest, TABLE.replace("-a -f 7 -r", "# a comment\n\nipvsadm -a -f 7 -r")) == DONE
    whole = saved(guest)
    assert len(whole) == len(TABLE.strip().splitlines())
    more = "-A -t localhost:81\n-E -t 10.0.0.1:80 -s wrr\n-d -t 10.0.0.1:80 -r 192.168.1.1:80\n-D -f 7\n"
    assert ipvsadm_restore(guest, more) == DONE
    assert [line for line in saved(guest) if line not in whole] == [
        "-A -t 10.0.0.1:80 -s wrr",
        "-A -t 127.0.0.1:81 -s wlc",
    ]
    assert len(saved(guest)) == len(whole) + 1 - 1 - 2
    assert ipvsadm_restore(guest, f"-C\n{TABLE}") == DONE
    assert saved(guest) == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-A -t 10.0.0.1:80", "line 303: Service already exists"),
        ("-a -t 10.0.0.9:80 -r 10.0.0.1", "line 303: Service not defined"),
        ("-A -t 10.0.0.9", "line 303: Zero port specified for non-persistent service"),
        ("-q", "line 303: Try `ipvsadm -h' or 'ipvsadm --help' for more information."),
        ("-A -t nosuch:80", "line 303: illegal virtual server address[:port] specified"),
        ("-Z", "line 303: zero: it cannot be taken back, so it has no place in a file"),
        ("ipvsadm -A ipvsadm -t 10.0.0.9:80", "line 303: unexpected argument ipvsadm"),
    ],
)
def test_a_table_with_rules_is_as_before_when_one_is_refused(guest: Guest, line: str, reason: str) -> None:
    """Also where hundreds before and after it have been done."""
    assert ipvsadm_restore(guest, TABLE) == DONE
    before = guest.run("ipvsadm", "-Ln", "--thresholds").stdout, saved(guest)
    edits = "-E -t 10.0.0.1:80 -s wrr\n-d -t 10.0.0.1:80 -r 192.168.1.1:80\n"
    rules = many(75) + edits + f"{line}\n" + many(150)[len(many(75)) :]
    assert ipvsadm_restore(guest, rules) == refused(reason)
    assert (guest.run("ipvsadm", "-Ln", "--thresholds").stdout, saved(guest)) == before


def test_others_have_their_turn_during_a_restore(guest: Guest) -> None:
    """What the guest's agent does at once does not keep it from everything else."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answers:
        connection.settimeout(PATIENCE)
        connection.connect(str(guest.runtime.root / "sandboxes" / guest.id / "shim.sock"))
        connection.sendall(request_to_restore(many(5000), "ipvsadm"))
        assert "progress" in json.loads(answers.readline())
        connection.sendall(b'{"id":2,"method":"kata-network.list-routes"}\n')
        ended: list[int] = []
        while len(ended) < 2:
            answer = json.loads(answers.readline())
            ended += [] if "progress" in answer else [answer["id"]]
    assert ended == [2, 1]


def test_replacing_changes_what_differs_and_no_more(guest: Guest) -> None:
    assert ipvsadm_restore(guest, TABLE) == DONE
    wanted = (
        "-A -t 10.0.0.1:80 -s rr -p 3000\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 7 -x 100\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.9 -g\n"
        "-A -f 7 -6 -s wlc\n"
        "-a -f 7 -6 -r [fd00:1::2]:0 -m\n"
        "-A -t 10.0.0.7:80\n"
    )
    changes = Result(
        0,
        "-D --sctp-service 10.0.0.2:0\n"
        "-D -u [fd00::1]:53\n"
        "-D -f 7\n"
        "-e -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 7 -x 100\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.9:80 -g -w 1\n"
        "-d -t 10.0.0.1:80 -r 192.168.1.1:80\n"
        "-d -t 10.0.0.1:80 -r [fd00:1::1]:80\n"
        "-E -f 7 -6 -s wlc\n"
        "-A -t 10.0.0.7:80 -s wlc\n",
        "",
    )
    before = saved(guest)
    planned = replace_by(guest, wanted, "--dry-run")
    assert replace(planned, stdout="".join(sorted(planned.stdout.splitlines(keepends=True)))) == replace(
        changes, stdout="".join(sorted(changes.stdout.splitlines(keepends=True)))
    )
    assert saved(guest) == before
    assert replace_by(guest, wanted) == DONE
    assert replace_by(guest, wanted, "--dry-run") == DONE
    assert saved(guest) == [
        "-A -t 10.0.0.1:80 -s rr -p 3000",
        "-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 7",
        "-a -t 10.0.0.1:80 -r 192.168.1.9:80 -g -w 1",
        "-A -t 10.0.0.7:80 -s wlc",
        "-A -f 7 -6 -s wlc",
        "-a -f 7 -6 -r [fd00:1::2]:0 -m -w 1",
    ]
    assert replace_by(guest, "-A -t 10.0.0.7:80\n-A -t 10.0.0.7:80\n") == refused(
        "line 2: Service already exists"
    )
    assert replace_by(guest, "-C\n") == refused("line 1: flush adds neither a service nor a server")
    assert replace_by(guest, "") == DONE
    assert saved(guest) == []


ECHO = """
import socket, sys
server = socket.create_server(("127.0.0.1", 8080))
client = socket.create_connection(("10.9.9.9", 80))
peer, _ = server.accept()
for line in sys.stdin:
    client.sendall(line.encode())
    print(peer.recv(100).decode(), end="", flush=True)
"""


COUNTED = "until ipvsadm -Ln --stats -t 10.9.9.9:80 | grep -q '^TCP  10.9.9.9:80  *1 '; do sleep 0.2; done"


def test_a_connection_survives_a_replacement(guest: Guest) -> None:
    """Through a service whose servers and options change around it, and its counters go on."""
    service, server = "-A -t 10.9.9.9:80 -s rr\n", "-a -t 10.9.9.9:80 -r 127.0.0.1:8080 -m\n"
    assert guest.run("ip", "address", "add", "10.9.9.9/32", "dev", "lo").status == 0
    assert replace_by(guest, service + server) == DONE
    words = ("exec", guest.id, "--", "python3", "-c", ECHO)
    with subprocess.Popen(
        guest.runtime.command(*words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=guest.runtime.environment,
    ) as echo:
        assert echo.stdin is not None
        assert echo.stdout is not None
        for rules in (
            service + server,
            many(3) + service + server + "-a -t 10.9.9.9:80 -r 127.0.0.2:8080 -m -w 5\n",
            service.replace("rr", "wlc") + server,
        ):
            assert replace_by(guest, rules) == DONE
            echo.stdin.write(b"hello\n")
            echo.stdin.flush()
            assert echo.stdout.readline() == b"hello\n"
            # The kernel's estimator adds up every other second, and tells nobody.
            assert guest.run("sh", "-c", COUNTED).status == 0
        listed = guest.run("ipvsadm", "-Lnc").stdout
        assert "ESTABLISHED 10.9.9.9:" in listed
        assert guest.ipvsadm("-Lnc", "--dialect", "ipvsadm").stdout.split()[:9] == listed.split()[:9]
        asked = ("--dialect", "ipvsadm", "--json", "--parameters", "-L --stats -t 10.9.9.9:80")
        (only,) = guest.runtime("kata-ipvs", "ipvsadm", *asked, guest.id).json
        assert (only["protocol"], only["address"], only["port"]) == ("tcp", "10.9.9.9", 80)
        assert (only["scheduler"], only["stats"]["connections"]) == ("wlc", 1)
        (one,) = only["servers"]
        assert (one["address"], one["port"], one["active"]) == ("127.0.0.1", 8080, 1)
        echo.stdin.close()
    assert guest.run("ip", "address", "del", "10.9.9.9/32", "dev", "lo").status == 0


def request_to_restore(rules: str, dialect: str) -> bytes:
    """The line that asks a shim to restore rules."""
    request = {"id": 1, "method": "kata-ipvs.restore", "params": {"rules": rules, "dialect": dialect}}
    return json.dumps(request).encode() + b"\n"


def cut(guest: Guest, rules: str, dialect: str, done: int) -> socket.socket:
    """Begin a restore; return the connection when so many rules are done, so that the next are under way."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(str(guest.runtime.root / "sandboxes" / guest.id / "shim.sock"))
    connection.sendall(request_to_restore(rules, dialect))
    with connection.makefile("rb") as answers:
        while done and json.loads(answers.readline())["progress"]["done"] < done:
            pass
    return connection


@pytest.mark.parametrize("whom", ["caller", "shim"])
@pytest.mark.parametrize("dialect", ["documented", "ipvsadm"])
def test_a_restore_that_is_cut_leaves_the_table_before_it(
    runtime: Runtime, tmp_path: Path, dialect: str, whom: str
) -> None:
    """The caller or the shim dies with a part of it done: the table has what it had, to the last option."""
    rules = many(3 * CHUNK // 4)  # of four rules each
    if dialect == "ipvsadm":
        rules = "-C\n" + rules
    with booted(runtime, tmp_path, f"cut-{whom}-{dialect}") as guest:
        if dialect == "ipvsadm":
            assert ipvsadm_restore(guest, TABLE + ODD) == DONE
        before = guest.run("ipvsadm", "-Ln", "--thresholds").stdout, saved(guest)
        for done in (0, 1, CHUNK + 1):
            with cut(guest, rules, dialect, done):
                if whom == "shim":
                    kill(shims(runtime.root, guest.id)[0])
            # The next shim has taken it back before it answers, and a change waits until it is taken back.
            if whom == "shim":
                assert runtime("state", guest.id).status == 0
            else:
                assert guest.ipvsadm("--set 0 0 0") == DONE
            assert (guest.run("ipvsadm", "-Ln", "--thresholds").stdout, saved(guest)) == before
        assert ipvsadm_restore(guest, f"-C\n{many(1250)}") == DONE
        assert len(saved(guest)) == 5000
