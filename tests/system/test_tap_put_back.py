"""A tap that was there before an add that did not come to its end has the MTU and state it had."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from pathlib import Path

import pytest

from tests.started import PATIENCE, kill, shims
from tests.support import Runtime
from tests.system.network import agree, booted, ip, link, nic, tap

RTMGRP_LINK = 1  # include/uapi/linux/rtnetlink.h
WANTED = 1400


@pytest.mark.parametrize(("mtu", "state"), [(1450, "down"), (1300, "up")])
def test_shim_killed_while_it_adds(runtime: Runtime, tmp_path: Path, mtu: int, state: str) -> None:
    """QEMU stands still meanwhile, so that the add cannot get further than the tap."""
    file = tmp_path / "nic.json"
    file.write_text(json.dumps(nic(1, mtu=WANTED)))
    with tap("tap1"), booted(runtime, tmp_path, "back") as guest:
        ip("link", "set", "tap1", state, "mtu", str(mtu))
        qemu = guest.record()["pid"]
        os.kill(qemu, signal.SIGSTOP)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as changes:
            changes.bind((0, RTMGRP_LINK))
            add = runtime.start("kata-network", "add-iface", guest.id, str(file))
            while link("tap1")["mtu"] != WANTED:
                assert select.select([changes], [], [], PATIENCE)[0]
                changes.recv(1 << 16)
        (shim,) = shims(runtime.root, guest.id)
        kill(shim)
        assert add.communicate(timeout=PATIENCE)[0] == b"null\n"
        os.kill(qemu, signal.SIGCONT)
        agree(guest)  # told by a new shim, which has taken back what the old one had begun
        found = link("tap1")
        assert (found["mtu"], "UP" in found["flags"]) == (mtu, state == "up")
        assert guest.network("add-iface", nic(1, mtu=WANTED)).status == 0
        agree(guest)
