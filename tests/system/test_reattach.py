"""A shim dies by SIGKILL: QEMU and guest go on, and the next call finds a shim that took everything over."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.started import PATIENCE, kill, shims, taken, watched
from tests.support import Guest, Result, Runtime, left_behind, leftovers
from tests.system.network import address, agree, booted, compact, held_files, listed, nic

MOMENTS = 30
SEED = 12
IDLE_ROUNDS = 12
CALLERS = 10
TAKEN_OVER = "took the sandbox over"
DEAD = "the shim of one ended before it answered"


@pytest.fixture(scope="module")
def own(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A root of this module's own: a shim that stands in for a dead one is nothing left behind."""
    own = Runtime(tmp_path_factory.mktemp("root"), runtime.config)
    before = leftovers(own.root)
    yield own
    after = left_behind(own.root, before)
    assert not after.processes | after.links | after.files, after


@pytest.fixture(scope="module")
def guest(own: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One sandbox whose shims the tests of this module kill."""
    with booted(own, tmp_path_factory.mktemp("one"), "one") as guest:
        yield guest


def shim_of(guest: Guest) -> int:
    """The pid of the one shim that there is."""
    (shim,) = shims(guest.runtime.root, guest.id)
    return shim


def taken_over(guest: Guest) -> int:
    """How often a shim has taken the sandbox over so far."""
    return (guest.runtime.root / "sandboxes" / guest.id / "shim.log").read_text().count(TAKEN_OVER)


@contextmanager
def untouched(guest: Guest) -> Iterator[None]:
    """QEMU is the same process at the end, and has not ended meanwhile."""
    with watched(guest.record()["pid"]) as ended:
        yield
        assert not ended()


@pytest.fixture(autouse=True)
def no_nics(guest: Guest) -> Iterator[None]:
    """A test that fails with NICs in its sandbox fails alone."""
    yield
    for one in listed(guest):
        guest.network("del-iface", {"name": one["name"]})


def test_shim_killed_while_idle(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    """The next call answers as if nothing had been; how long that takes is told."""
    assert guest.network("add-iface", nic(1, IPAddresses=address("10.0.1.1", 24))).status == 0
    before = guest.network("list-ifaces")
    times = []
    with untouched(guest):
        for _ in range(IDLE_ROUNDS):
            kill(shim_of(guest))
            started = time.monotonic()
            answer = guest.network("list-ifaces")
            times.append(taken(started))
            assert answer == before, answer.stderr
        agree(guest)
    assert max(times) < PATIENCE
    with capsys.disabled():
        median, worst = statistics.median(times) * 1000, max(times) * 1000
        print(f"\nre-attach by the next call: median {median:.0f} ms, at most {worst:.0f} ms")


def test_ten_callers_find_one_shim(guest: Guest) -> None:
    with untouched(guest):
        kill(shim_of(guest))
        count = taken_over(guest)
        calls = [guest.runtime.start("kata-network", "list-ifaces", guest.id) for _ in range(CALLERS)]
        for call in calls:
            assert call.communicate(timeout=PATIENCE) == (b"null\n", b"")
        assert [call.returncode for call in calls] == [0] * CALLERS
        assert taken_over(guest) == count + 1
        shim_of(guest)


def test_every_command_takes_over(guest: Guest) -> None:
    """Also a command whose own work needs the guest at once, and one that only asks."""
    with untouched(guest):
        for command in (("state",), ("exec", "--", "true"), ("kata-network", "list-routes")):
            kill(shim_of(guest))
            words = (
                [command[0], *command[1:2], guest.id]
                if command[0] == "kata-network"
                else [command[0], guest.id, *command[1:]]
            )
            answer = guest.runtime(*words)
            assert (answer.status, answer.stderr) == (0, ""), answer
        kill(shim_of(guest))
        (line,) = guest.runtime("list", "--json").json
        assert (line["status"], line["pid"]) == ("unknown", 0), "list starts no shim"
        assert shims(guest.runtime.root, guest.id) == []
        assert guest.run("true").status == 0


def test_guest_that_stands_still_is_taken_over(guest: Guest) -> None:
    """A sandbox whose guest does not answer runs all the same, and is whole when it does again."""
    directory = guest.runtime.root / "sandboxes" / guest.id
    assert guest.network("add-iface", nic(2)).status == 0
    before = guest.network("list-ifaces")
    with untouched(guest):
        kill(shim_of(guest))
        _tell(directory, "stop")
        assert guest.network("list-ifaces") == before
        assert guest.runtime("state", guest.id).json["status"] == "running"
        kill(shim_of(guest))
        _tell(directory, "cont")
        agree(guest)


def _tell(directory: Path, command: str) -> None:
    """Send QEMU a command by a monitor that no shim holds."""
    with socket.socket(socket.AF_UNIX) as monitor, monitor.makefile("rwb") as lines:
        monitor.settimeout(PATIENCE)
        monitor.connect(str(directory / "qmp.sock"))
        for name in ("qmp_capabilities", command):
            lines.write(compact({"execute": name}).encode())
            lines.flush()
            while b'"return"' not in lines.readline():
                pass


class Round:
    """Operations that run at the same time, and a shim that is killed under them."""

    def __init__(self, guest: Guest, number: int) -> None:
        self._guest = guest
        self.added = nic(10 + number % 8, mtu=1400 + number, IPAddresses=address(f"10.1.{number}.1", 24))
        self.deleted = nic(10 + (number + 5) % 8)
        self.route = {"device": "lo", "dest": f"10.2.{number}.0/24"}
        self._dropped = {"device": "lo", "dest": f"10.2.{number - 3}.0/24"}
        self._calls: dict[str, subprocess.Popen[bytes]] = {}
        self.ends: dict[str, Result] = {}

    def start(self) -> None:
        """Start them all."""
        for command, value in (
            ("add-iface", self.added),
            ("del-iface", self.deleted),
            ("add-route", self.route),
            ("del-route", self._dropped),
        ):
            read, write = os.pipe()
            os.write(write, json.dumps(value).encode())
            os.close(write)
            self._calls[command] = self._guest.runtime.start(
                "kata-network", command, self._guest.id, "-", stdin=read
            )
            os.close(read)

    def end(self) -> None:
        """Wait for their ends: a call that was cut says so, and prints what a failure prints."""
        for command, call in self._calls.items():
            out, err = call.communicate(timeout=PATIENCE)
            self.ends[command] = end = Result(call.returncode, out.decode(), err.decode())
            if end.status and DEAD in end.stderr:
                assert end.stdout == "null\n", (command, end)

    def wait(self, seconds: float) -> bool:
        """Let time pass; return True at once when the slowest of them has ended."""
        with watched(self._calls["add-iface"].pid) as ended:
            return ended(seconds)

    @property
    def cut(self) -> bool:
        """Whether the shim's death was felt."""
        return any(DEAD in end.stderr for end in self.ends.values())

    def judge(self, names: set[str], routes: set[str]) -> tuple[set[str], set[str]]:
        """Check that each is whole or gone, by what was there before; return what is there now."""
        told = {one["name"]: one for one in listed(self._guest)}
        name = self.added["name"]
        if name in names:
            assert name in told, "a NIC that was there went away"
        elif self.ends["add-iface"].status == 0:
            assert name in told, "a NIC that was reported is not there"
        if name in told and name not in names:
            (ip,) = self.added["IPAddresses"]
            assert told[name]["ip"] == [f"{ip['address']}/{ip['mask']}"]
            assert told[name]["mtu"] == self.added["mtu"]
        if self.ends["del-iface"].status == 0:
            assert self.deleted["name"] not in told, "a NIC that was reported gone is there"
        assert set(told) - names <= {name}
        assert names - set(told) <= {self.deleted["name"]}
        now = {one["dest"] for one in self._guest.network("list-routes").json or [] if one["device"] == "lo"}
        if self.ends["add-route"].status == 0:
            assert self.route["dest"] in now
        if self.ends["del-route"].status == 0:
            assert self._dropped["dest"] not in now
        assert now - routes <= {self.route["dest"]}
        assert routes - now <= {self._dropped["dest"]}
        return set(told), now


def test_shim_killed_at_random_moments(guest: Guest) -> None:
    """Whenever it dies, each operation is whole or gone, and record, QEMU, guest and host agree."""
    chance = random.Random(SEED)
    files = held_files(guest)
    names: set[str] = set()
    routes: set[str] = set()
    started = time.monotonic()
    undisturbed = Round(guest, 0)
    undisturbed.start()
    undisturbed.end()
    longest = taken(started)
    names, routes = undisturbed.judge(names, routes)
    assert len(names) == 1
    each = held_files(guest) - files
    cut = 0
    with untouched(guest):
        for number in range(1, MOMENTS + 1):
            shim, count = shim_of(guest), taken_over(guest)
            running = Round(guest, number)
            started = time.monotonic()
            running.start()
            if running.wait(chance.uniform(0, longest)):
                longest = min(longest, taken(started))  # that of the first was a bad moment's
            kill(shim)
            running.end()
            cut += running.cut
            names, routes = running.judge(names, routes)
            agree(guest)
            assert taken_over(guest) == count + 1
            shim_of(guest)
            assert held_files(guest) == files + each * len(names), "QEMU keeps what belongs to no NIC"
        assert cut > MOMENTS / 3, "the moments were too late to hit anything"
        for name in names:
            assert guest.network("del-iface", {"name": name}) == Result(0, "null\n", "")
        assert guest.network("update-routes", []).status == 0
        agree(guest)
        assert held_files(guest) == files


def test_shim_killed_while_it_updates(guest: Guest) -> None:
    """An update that was cut is whole or not begun: name, MTU and address belong together."""
    chance = random.Random(SEED + 1)
    before = nic(1, mtu=1300, IPAddresses=address("10.3.0.1", 24))
    after = nic(1, name="renamed", mtu=1200, IPAddresses=address("10.3.0.2", 24))
    assert guest.network("add-iface", before).status == 0
    shown = {
        value["name"]: {
            "name": value["name"],
            "mac": value["hwAddr"],
            "ip": [f"{value['IPAddresses'][0]['address']}/24"],
            "mtu": value["mtu"],
        }
        for value in (before, after)
    }
    started = time.monotonic()
    assert guest.network("update-iface", after).status == 0
    assert guest.network("update-iface", before).status == 0
    longest = taken(started) / 2
    for _ in range(MOMENTS // 3):
        shim = shim_of(guest)
        with subprocess.Popen(
            guest.runtime.command("kata-network", "update-iface", guest.id, "-"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=guest.runtime.environment,
        ) as call:
            assert call.stdin is not None
            call.stdin.write(json.dumps(after).encode())
            call.stdin.close()
            with watched(call.pid) as ended:
                ended(chance.uniform(0, longest))
            kill(shim)
            assert call.wait(PATIENCE) in (0, 1)
        (now,) = listed(guest)
        assert now == shown[now["name"]]
        agree(guest)
        assert guest.network("update-iface", before).status == 0


# delete clears everything


def _no_record(directory: Path) -> None:
    (directory / "record.json").unlink()


def _damaged_record(directory: Path) -> None:
    text = (directory / "record.json").read_text()
    (directory / "record.json").write_text(text[: len(text) // 2])


def _foreign_record(directory: Path) -> None:
    record: dict[str, Any] = json.loads((directory / "record.json").read_text())
    (directory / "record.json").write_text(compact({**record, "pid": "1", "nics": None}))


def _no_sockets(directory: Path) -> None:
    for path in directory.glob("*.sock"):
        path.unlink()
    (directory / "shim.sock").write_text("")


def _dead_qemu(directory: Path) -> None:
    kill(json.loads((directory / "record.json").read_text())["pid"])


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (_no_record, "record.json: No such file or directory"),
        (_damaged_record, "record.json: not a record of this version: "),
        (_foreign_record, "record.json: not a record of this version: '1' is not int"),
        (_dead_qemu, "QEMU has ended"),
    ],
)
def test_delete_without_a_shim(own: Runtime, tmp_path: Path, damage: Any, cause: str) -> None:
    """A shim that cannot take over says why; delete then leaves no process, tap, claim or directory."""
    with booted(own, tmp_path, "gone") as guest:
        assert guest.network("add-iface", nic(40)).status == 0
        qemu = guest.record()["pid"]
        kill(shim_of(guest))
        with watched(qemu) as ended:
            damage(own.root / "sandboxes" / "gone")
            answer = own("state", "gone").json
            assert answer["status"] == "stopped"
            assert cause in answer["cause"]
            told = own("kata-network", "list-ifaces", "gone")
            assert told == Result(1, "null\n", f"sandbox gone is stopped: {answer['cause']}\n")
            kill(shim_of(guest))
            assert own("delete", "gone") == Result(0, "", "")
            assert ended()
        assert not (own.root / "sandboxes" / "gone").exists()
        assert not os.listdir(own.root / "devices")
        assert "tap40" not in os.listdir("/sys/class/net")


def test_qemu_that_cannot_be_reached(own: Runtime, tmp_path: Path) -> None:
    """Every call says so, and none ends a sandbox that runs but a forced delete."""
    with booted(own, tmp_path, "gone") as guest:
        assert guest.network("add-iface", nic(40)).status == 0
        qemu = guest.record()["pid"]
        kill(shim_of(guest))
        with watched(qemu) as ended:
            _no_sockets(own.root / "sandboxes" / "gone")
            answer = own("state", "gone").json
            assert (answer["status"], answer["pid"]) == ("running", qemu)
            assert answer["cause"].startswith("sandbox gone runs and cannot be taken over now: ")
            assert answer["cause"].endswith("console.sock: No such file or directory")
            assert own("kata-network", "list-ifaces", "gone") == Result(1, "null\n", answer["cause"] + "\n")
            message = "sandbox gone is running; stop it first, or delete it with --force\n"
            assert own("delete", "gone") == Result(1, "", message)
            assert own("delete", "--force", "gone") == Result(0, "", "")
            assert ended()
        assert not (own.root / "sandboxes" / "gone").exists()
        assert not os.listdir(own.root / "devices")
        assert "tap40" not in os.listdir("/sys/class/net")


def test_delete_with_a_dead_shim(own: Runtime, tmp_path: Path) -> None:
    """A sandbox that runs still needs force, and then all of it goes."""
    with booted(own, tmp_path, "gone") as guest:
        with watched(guest.record()["pid"]) as ended:
            kill(shim_of(guest))
            message = "sandbox gone is running; stop it first, or delete it with --force\n"
            assert own("delete", "gone") == Result(1, "", message)
            kill(shim_of(guest))
            assert own("delete", "--force", "gone") == Result(0, "", "")
            assert ended()
        assert not (own.root / "sandboxes" / "gone").exists()
