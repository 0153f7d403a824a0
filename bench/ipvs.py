"""What IPVS rules cost, beside ipvsadm in the same guest and beside the least that the kernel takes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from bench import ipvs_in_guest
from bench.cases import Comparison
from bench.memory import pss
from bench.place import CLI
from bench.stand import SANDBOX, Stand
from kata_shim.contract.ipvs import parse_rules
from kata_shim.ipvs import netlink, wire

SERVICES, SERVERS = 5000, 3
SINGLE = 100
_RULES, _MESSAGES = "/tmp/rules", "/tmp/messages"  # in the guest


def rules(services: int = SERVICES) -> str:
    """Return rules of the documented kind."""
    lines = []
    for number in range(services):
        service = f"10.{number >> 8 & 255}.{number & 255}.1:100"
        lines.append(f"-A -t {service} -s rr -p 3000\n")
        lines += [f"-a -t {service} -r 172.16.0.{server + 1}:80 -m\n" for server in range(SERVERS)]
    return "".join(lines)


def restore(stand: Stand, rounds: int) -> list[Comparison]:
    """(k) 20,000 rules restored, (l) and listed; and what the shim holds of memory meanwhile."""
    beside = Comparison("(k) `--restore`, CLI start to exit", "`ipvsadm -R` in the guest", "≤ 1/3")
    least = Comparison("(k) the same", "prepared messages sent in the guest", "≤ 1.35")
    listed = Comparison("(l) `--list`, CLI start to exit", "`ipvsadm -Ln` in the guest", "≤ 1/3")
    text = rules()
    path = stand.root / "rules"
    path.write_text(text)
    _put(stand, _RULES, text.encode())
    _put(stand, _MESSAGES, _messages(text))
    restoring = [CLI, "kata-ipvs", "ipvsadm", "--restore", str(path), SANDBOX]
    listing = [CLI, "kata-ipvs", "ipvsadm", "--parameters", "-Ln", SANDBOX]
    for _ in range(rounds):
        beside.measured.append(stand.time(restoring))
        listed.measured.append(stand.time(listing))
        listed.basis.append(_in_guest(stand, "time", "/dev/null", "ipvsadm", "-Ln"))
        _clear(stand)
        beside.basis.append(_in_guest(stand, "time", _RULES, "ipvsadm", "-R"))
        _clear(stand)
        least.basis.append(_in_guest(stand, "floor", _MESSAGES))
        _clear(stand)
    least.measured = beside.measured
    return [beside, least, listed]


def single(stand: Stand, rounds: int) -> list[Comparison]:
    """(m) 100 services added one by one: as processes, and on one connection."""
    beside = f"{SINGLE} × `ipvsadm -A` in the guest"
    processes = Comparison(f"(m) {SINGLE} × `--add-service`, as processes one after another", beside, "")
    pipelined = Comparison(f"(m) {SINGLE} × add-service on one connection, sent without waiting", beside, "")
    options = [f"-A -t 10.0.0.{number + 1}:80 -s rr -p 3000" for number in range(SINGLE)]
    words = [CLI, "kata-ipvs", "ipvsadm", SANDBOX, "--parameters"]
    script = "".join(f"ipvsadm {one}\n" for one in options)
    with stand.lines() as connection:
        for _ in range(rounds):
            began = time.perf_counter()
            for one in options:
                stand.wait(stand.spawn([*words, one]))
            processes.measured.append(time.perf_counter() - began)
            _clear(stand)
            began = time.perf_counter()
            connection.send(*(("ipvsadm", {"parameters": one}) for one in options), group="kata-ipvs")
            connection.receive(SINGLE)
            pipelined.measured.append(time.perf_counter() - began)
            _clear(stand)
            processes.basis.append(_in_guest(stand, "time", "/dev/null", "sh", "-c", script))
            _clear(stand)
    pipelined.basis = processes.basis
    return [processes, pipelined]


def memory(stand: Stand, rounds: int) -> list[Comparison]:
    """(n) what a restore of 20,000 rules and their list add to the shim's memory, and what stays of that."""
    most = Comparison("(n) a shim's PSS at its most while 20,000 rules are restored and listed", "before", "")
    after = Comparison("(n) the same, afterwards", "before", "")
    path = stand.root / "rules"
    path.write_text(rules())
    for _ in range(rounds):
        stand.kill_shim()
        shim = stand.state()["shimPid"]
        before = pss(shim)
        peaks = []
        for words in (("--restore", str(path)), ("--parameters", "-Ln")):
            pid = stand.spawn([CLI, "kata-ipvs", "ipvsadm", *words, SANDBOX])
            while not _has_ended(pid):
                peaks.append(pss(shim))
        _clear(stand)
        most.measured.append(max(peaks))
        after.measured.append(pss(shim))
        most.basis.append(before)
    after.basis = most.basis
    for row in (most, after):
        row.unit = "MiB"
    most.reach = "≤ 20 MiB more"
    return [most, after]


def _has_ended(pid: int) -> bool:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended and status:
        raise RuntimeError(f"a command ended with status {os.waitstatus_to_exitcode(status)}")
    return bool(ended)


def _messages(text: str) -> bytes:
    """Return the rules compiled, of which only the last is to be acknowledged; the family is put in there."""
    found = parse_rules(text)
    last = len(found) - 1
    return b"".join(
        wire.message(rule.command, 0, number + 1, netlink.NLM_F_ACK if number == last else 0)
        for number, rule in enumerate(found)
    )


def _put(stand: Stand, path: str, data: bytes) -> None:
    command = [CLI, "exec", SANDBOX, "--", "sh", "-c", f"cat > {path}"]
    subprocess.run(command, env=stand.environment, input=data, check=True)


def _in_guest(stand: Stand, *words: str) -> float:
    script = Path(ipvs_in_guest.__file__).read_text()
    return float(stand.cli("exec", SANDBOX, "--", "python3", "-I", "-S", "-c", script, *words))


def _clear(stand: Stand) -> None:
    stand.cli("kata-ipvs", "ipvsadm", "--dialect", "ipvsadm", "--parameters", "-C", SANDBOX)
