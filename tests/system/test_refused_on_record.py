"""What an earlier version has put on record and this one refuses: the sandbox lives, and callers hear why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.started import kill, shims, watched
from tests.support import Guest, Result, Runtime
from tests.system.network import agree, booted, nic


def _configuration(text: str) -> str:
    section = "[hypervisor.qemu]\n"
    return text.replace(section, section + "agent_timeout = 0\n")


def _nic(text: str) -> str:
    record = json.loads(text)
    record["nics"][0]["interface"]["mtu"] = 1
    return json.dumps(record)


def _kill_shim(guest: Guest) -> None:
    (shim,) = shims(guest.runtime.root, guest.id)
    kill(shim)


@pytest.mark.parametrize(
    ("name", "refused", "reason"),
    [
        (
            "configuration.toml",
            _configuration,
            "configuration.toml:2: [hypervisor.qemu] agent_timeout: 0 is not within 1..3600 seconds",
        ),
        (
            "record.json",
            _nic,
            "a NIC on record is not of this version: the sandbox's record is damaged: mtu: 1 ",
        ),
    ],
)
def test_refused_on_record(
    runtime: Runtime, tmp_path: Path, name: str, refused: Callable[[str], str], reason: str
) -> None:
    file = runtime.root / "sandboxes" / "old" / name
    with booted(runtime, tmp_path, "old") as guest:
        assert guest.network("add-iface", nic(1)).status == 0
        qemu = guest.record()["pid"]
        with watched(qemu) as ended:
            _kill_shim(guest)
            taken = file.read_text()
            file.write_text(refused(taken))
            state = runtime("state", "old").json
            assert (state["status"], state["pid"], state["ifaces"]) == ("running", qemu, 1)
            assert state["cause"].startswith("sandbox old runs and cannot be taken over now: ")
            assert reason in state["cause"]
            assert guest.network("list-ifaces") == Result(1, "null\n", state["cause"] + "\n")
            message = "sandbox old is running; stop it first, or delete it with --force\n"
            assert runtime("delete", "old") == Result(1, "", message)
            _kill_shim(guest)
            file.write_text(taken)
            agree(guest)  # a shim of the version that took it finds everything as it was
            _kill_shim(guest)
            file.write_text(refused(taken))
            assert not ended()
            assert runtime("delete", "--force", "old") == Result(0, "", "")
            assert ended()
