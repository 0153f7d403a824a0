"""DPDK's testpmd as a switch: a vhost-user back end whose every packet goes to a tap of the host and back."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.system.network import ip

PATIENCE = 60.0  # seconds
HOST = "10.9.0.1"
GUEST = "10.9.0.2"
READY = "Press enter to exit"


class Switch:
    """A running testpmd; what it prints is always read, for it stands still while it cannot print."""

    def __init__(self, terminal: int, pid: int) -> None:
        self.pid = pid
        self._terminal = terminal
        self._said = ""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def until(self, text: str) -> None:
        """Wait until it has printed `text`, and forget what it printed so far."""
        with self._more:
            assert self._more.wait_for(lambda: text in self._said, PATIENCE), self._said[-2000:]
            self._said = self._said.partition(text)[2]

    def join(self) -> None:
        """Wait until the last has closed the terminal's other end."""
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: it has ended
            while data := os.read(self._terminal, 65536):
                with self._more:
                    self._said += data.decode(errors="replace")
                    self._more.notify_all()


@contextmanager
def switch(socket: Path, queues: int = 1) -> Iterator[Switch]:
    """Run testpmd with a back end at `socket`, its tap `pmdtap` being up with the address HOST."""
    prefix = f"test{os.getpid()}"
    terminal, other = pty.openpty()
    command = ["dpdk-testpmd", "-l", "0,1", "--no-huge", "-m", "256", "--no-pci", f"--file-prefix={prefix}"]
    command += ["--vdev", f"net_vhost0,iface={socket},queues={queues}", "--vdev", "net_tap0,iface=pmdtap"]
    command += ["--", "--auto-start", f"--rxq={queues}", f"--txq={queues}", "--forward-mode=io"]
    command += ["--total-num-mbufs=8192", "--nb-cores=1", "--port-topology=paired"]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    running = Switch(terminal, process.pid)
    try:
        running.until(READY)
        ip("address", "add", f"{HOST}/24", "dev", "pmdtap")
        ip("link", "set", "pmdtap", "up")
        yield running
        os.write(terminal, b"\n")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        running.join()
        os.close(terminal)
        shutil.rmtree(f"/run/dpdk/{prefix}", ignore_errors=True)
