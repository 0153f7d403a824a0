"""A running factory, as `kata-runtime factory init` in the foreground."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kata_shim.qemu.process import find_by_log
from tests.started import PATIENCE
from tests.support import Result, Runtime

EMULATED = "as configured: QEMU emulates (TCG), which is slow\n"
SERVES = "the factory serves"


def configure(path: Path, own: Path, number: int = 1, /, *, clone: bool = True, **fields: object) -> Path:
    """Write a configuration for a small machine, templates and endpoint in `own`, `number` VMs kept ready."""
    values = {"accelerator": "tcg", "default_memory": 300, "default_root_ports": 2, **fields}
    values = {"shared_memory": False, **values}
    lines = ["[hypervisor.qemu]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    lines += ["[factory]", f"enable_template = {json.dumps(clone)}", f'template_path = "{own}/templates"']
    lines += [f"vm_cache_number = {number}", f'vm_cache_endpoint = "{own}/run/cache.sock"']
    path.write_text("\n".join([*lines, ""]))
    return path


@dataclass(frozen=True)
class Factory:
    """A factory that serves; `said` is what it logged until then."""

    runtime: Runtime
    endpoint: Path
    process: subprocess.Popen[str]
    said: str

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def until(self, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until its status is so, and return it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(self.endpoint))
            connection.sendall(b'{"id":1,"method":"factory.watch"}\n')
            with connection.makefile() as lines:
                for line in lines:
                    status: dict[str, Any] = json.loads(line)["progress"]
                    if reached(status):
                        return status
        raise AssertionError("the factory ended first")

    def until_full(self, handed_over: int = 0) -> dict[str, Any]:
        """Wait until no VM is missing, and that many have been handed over."""
        return self.until(lambda s: s["ready"] == s["wanted"] and s["handed_over"] >= handed_over)

    def vms(self) -> list[int]:
        """The pids of the VMs that are the factory's."""
        return vms(self.runtime)

    def end(self, number: int = signal.SIGTERM) -> Result:
        """End it by a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return Result(self.process.returncode, out, err)


def vms(runtime: Runtime) -> list[int]:
    """The pids of the QEMUs in the factory's directory of this root."""
    return sorted(pid for pid, _ in find_by_log(*runtime.root.glob("factory/vms/*/qemu.log")))


@contextmanager
def serving(runtime: Runtime, endpoint: Path) -> Iterator[Factory]:
    """Run a factory; at the end it has ended, be it by SIGTERM, and left nothing if it was that."""
    process = subprocess.Popen(
        runtime.command("factory", "init"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=runtime.environment,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if SERVES in line:
                break
        assert SERVES in said, said
        factory = Factory(runtime, endpoint, process, said)
        yield factory
        if process.poll() is None:
            ended = factory.end()
            assert (ended.status, ended.stdout) == (0, ""), ended
            assert not (runtime.root / "factory").exists()
            assert not os.path.lexists(endpoint)
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def run(runtime: Runtime, sandbox_id: str) -> str:
    """Start a sandbox; return where its VM came from."""
    started = runtime("run", "--detach", sandbox_id)
    assert started == Result(0, "", EMULATED), started
    return str(runtime("state", sandbox_id).json["source"])


def delete(runtime: Runtime, *ids: str) -> None:
    """Delete sandboxes."""
    for sandbox_id in ids:
        assert runtime("delete", "--force", sandbox_id) == Result(0, "", "")
