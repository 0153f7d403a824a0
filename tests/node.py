"""A node with a factory and a sandbox: any process of it may be killed at any moment, and what is left."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from kata_shim.qemu.process import find_by_log
from tests.factory import SERVES, Factory, configure, vms
from tests.started import PATIENCE, shims, watched
from tests.support import Result, Runtime, leftovers, settle
from tests.system.network import nic
from tests.zygote import parent

ID = "a"
PIPE = 1 << 20  # bytes: what a factory says that nobody reads
LOOK = 0.001  # seconds between two looks for what is not there yet
AGAIN = 0.2  # of all destructions: those with the template, which takes some seconds to make
# Seconds that it takes, about: the moment of the kill is drawn from them. One after the end is as good.
LASTS = {"run": 0.15, "refill": 0.5, "add-iface": 0.06, "delete": 0.08, "init": 3.0, "destroy": 0.3}
MOMENTS = {
    "run": ("shim", "factory", "zygote", "waiting VM", "QEMU", "command"),
    "refill": ("factory", "zygote", "waiting VM", "shim", "QEMU"),
    "add-iface": ("shim", "QEMU", "command"),
    "delete": ("shim", "QEMU", "command"),
    "init": ("factory", "zygote", "waiting VM"),
    "destroy": ("factory", "waiting VM", "command"),
}
Command = subprocess.Popen[str]


class Node:
    """One root of state, with its factory while `self._factory` is one."""

    def __init__(self, own: Runtime, directory: Path, wanted: int, chance: random.Random) -> None:
        """Start nothing yet; templates and endpoint are in `directory`, where nothing else is."""
        self._own = own
        # Its template is somewhere else: one that is destroyed with it need not make its own again.
        self._keeping = configure(directory / "keeping.toml", directory / "elsewhere")
        self._nic = directory / "nic.json"
        self._nic.write_text(json.dumps(nic(1)))
        self._templates = directory / "templates"
        self._endpoint = directory / "run/cache.sock"
        self._wanted = wanted
        self._chance = chance
        self._factory: Command | None = None
        self._serves = False

    def kill(self, moment: str, victims: Sequence[str]) -> bool:
        """Kill processes at some moment; assert the next command leaves nothing. False: none was there."""
        command = self._begin(moment)
        hit = self._strike(victims, command, moment)
        if command is not self._factory:
            self._end(command, moment, victims)
        if moment == "destroy":
            self.destroy(template=False)
            return hit
        self._delete()
        if "factory" not in victims:
            self._until_whole()
        elif self._chance.random() < 0.5:
            self.destroy(template=self._chance.random() < AGAIN)
        else:
            self._bury()
            self._init()
            self._until_whole()
        return hit

    def destroy(self, *, template: bool = True) -> None:
        """Run `factory destroy`; assert that nothing is left, but the template if that is to stay."""
        config = self._own.config if template else self._keeping
        destroyed = self._own("factory", "destroy", "--config", str(config))
        assert destroyed == Result(0, "", ""), destroyed
        self._bury()
        settle(self._own.root)
        assert not leftovers(self._own.root).processes
        left = {path.name for path in self._own.root.rglob("*")}
        assert left <= {"sandboxes", "devices"}, left
        assert not (template and os.listdir(self._templates))
        assert os.listdir(self._endpoint.parent) == []

    def clear(self) -> None:
        """Leave nothing, whatever has failed."""
        self._own("delete", "--force", ID)
        self._own("factory", "destroy")
        if self._factory is not None:
            self._factory.kill()
            self._bury()

    # What goes on when a process is killed

    def _begin(self, moment: str) -> Command:
        """Begin what is to be disturbed; return the process that does it."""
        if moment == "init":
            self.destroy(template=self._chance.random() < AGAIN)
            return self._init()
        factory = self._factory or self._init()
        self._until_whole()
        if moment in ("refill", "add-iface", "delete"):
            assert self._own("run", "--detach", ID).status == 0
        if moment == "refill":
            return factory
        if moment == "delete":
            assert self._own("kata-network", "add-iface", ID, str(self._nic)).status == 0
        words = {
            "run": ("run", "--detach", ID),
            "add-iface": ("kata-network", "add-iface", ID, str(self._nic)),
            "delete": ("delete", "--force", ID),
            "destroy": ("factory", "destroy", "--config", str(self._keeping)),
        }
        return self._start(*words[moment])

    def _strike(self, victims: Sequence[str], command: Command, moment: str) -> bool:
        """Kill one of each, as soon as there is one; return False if `command` has ended before.

        They have ended then: who calls one that is just dying hears that it died.
        """
        after = self._chance.uniform(0, LASTS[moment])
        with ExitStack() as killed, watched(command.pid) as ended:
            if moment == "run" and self._chance.random() < 0.5:
                while not self._has_qemu() and not ended(LOOK):
                    pass
            else:
                ended(after)
            for victim in victims:
                while not (found := self._find(victim, command)):
                    if ended(LOOK):
                        return False
                pid = self._chance.choice(sorted(found))
                with suppress(ProcessLookupError):
                    has_died = killed.enter_context(watched(pid))
                    killed.callback(has_died, PATIENCE)
                    os.kill(pid, signal.SIGKILL)
        return True

    def _has_qemu(self) -> bool:
        """Whether the sandbox has a QEMU, of which no record need tell yet."""
        sandbox = self._own.root / "sandboxes" / ID
        return (sandbox / "taken").exists() or (sandbox / "qemu.log").exists()

    def _find(self, victim: str, command: Command) -> Iterable[int]:
        assert self._factory is not None
        root = self._own.root
        match victim:
            case "command":
                return [] if command.poll() is not None else [command.pid]
            case "factory":
                return [] if self._factory.poll() is not None else [self._factory.pid]
            case "zygote":
                return _zygotes(root, self._factory.pid)
            case "waiting VM":
                return vms(self._own)
            case "shim":
                return shims(root, ID)
            case _:
                return [pid for pid, _ in find_by_log(*root.glob("sandboxes/*/**/qemu.log"))]

    def _end(self, command: Command, moment: str, victims: Sequence[str]) -> None:
        """Wait for a command's end; unless it or its shim was killed it succeeds, or leaves nothing."""
        told = command.communicate(timeout=PATIENCE)
        if "command" in victims or "shim" in victims:
            return
        if command.returncode and "QEMU" in victims:
            assert moment == "add-iface" or not (self._own.root / "sandboxes" / ID).exists(), told
        else:
            assert command.returncode == 0, told

    # Its parts

    def _start(self, *arguments: str) -> Command:
        return subprocess.Popen(
            self._own.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._own.environment,
            text=True,
        )

    def _init(self) -> Command:
        self._factory, self._serves = self._start("factory", "init"), False
        assert self._factory.stderr is not None
        fcntl.fcntl(self._factory.stderr, fcntl.F_SETPIPE_SZ, PIPE)
        return self._factory

    def _until_whole(self) -> None:
        """Wait until the factory has all that it is to have; assert that it has no more."""
        assert self._factory is not None
        assert self._factory.stderr is not None
        self._serves = self._serves or any(SERVES in line for line in self._factory.stderr)
        assert self._serves, "the factory has ended"
        factory = Factory(self._own, self._endpoint, self._factory, "")
        factory.until(
            lambda status: status["zygote"] > 0 and status["ready"] == len(vms(self._own)) == self._wanted
        )
        assert len(list(self._own.root.glob("factory/vms/*"))) == self._wanted

    def _delete(self) -> None:
        """Delete the sandbox; assert that nothing is left of it."""
        root = self._own.root
        deleted = self._own("delete", "--force", ID)
        assert deleted == Result(0, "", ""), deleted
        for pid in _writers(f"{root}/sandboxes"):  # a shim answers the call that ends it first
            with suppress(ProcessLookupError), watched(pid) as ended:
                assert ended(PATIENCE), f"{pid} is left"
        assert not [*root.glob("sandboxes/*"), *root.glob("devices/*")]
        assert nic(1)["device"] not in os.listdir("/sys/class/net")

    def _bury(self) -> None:
        if self._factory is not None:
            self._factory.communicate(timeout=PATIENCE)
            self._factory = None


def _processes() -> Iterable[int]:
    return map(int, filter(str.isdigit, os.listdir("/proc")))


def _writers(directory: str) -> Iterable[int]:
    """Yield every process whose stdout is in there, or was."""
    for pid in _processes():
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/1").startswith(directory):
                yield pid


def _zygotes(root: Path, factory: int) -> list[int]:
    found = []
    for pid in _processes():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"zygote" in words and bytes(root) in words and parent(pid) == factory:
                found.append(pid)
    return found
