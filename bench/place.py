"""A root of state of its own with a configuration.toml of its own, the CLI on it, and a factory if wanted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from kata_shim import registry
from kata_shim.config import Config, load
from kata_shim.factory import tmpfs

PROJECT = Path(__file__).resolve().parent.parent
INTERPRETER = str(PROJECT / ".venv/bin/python3")
CLI = str(PROJECT / ".venv/bin/kata-runtime")
PATIENCE = 120.0  # seconds


class Ground:
    """A tmpfs for all that is measured, as /run is on most hosts; gone when the `with` ends."""

    def __init__(self) -> None:
        self.path = Path(f"/run/kata-shim-bench.{os.getpid()}")

    def __enter__(self) -> Self:
        self.path.mkdir(mode=0o700)
        tmpfs.mount(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        tmpfs.unmount(self.path)
        self.path.rmdir()


class Place:
    """One root of state; in the end its sandboxes and its factory are gone."""

    def __init__(self, ground: Ground, name: str, *, clone: bool = True, cache: int = 0) -> None:
        """Write the shipped configuration.toml with other paths, and start nothing.

        All places of a ground that `clone` have one template; `cache` is how many VMs the factory keeps.
        """
        self.root = ground.path / name
        self.root.mkdir(mode=0o700)
        self.configuration = self.root / "configuration.toml"
        self._cache = cache
        self._endpoint = self.root / "run/cache.sock"
        fields = {
            "enable_template": clone,
            "template_path": str(ground.path / "template"),
            "vm_cache_number": cache,
            "vm_cache_endpoint": str(self._endpoint),
        }
        self.configuration.write_text(_configured((PROJECT / "configuration.toml").read_text(), fields))
        self.environment = {
            **os.environ,
            "KATA_SHIM_ROOT": str(self.root),
            "KATA_SHIM_CONFIG": str(self.configuration),
        }
        self._ending = ExitStack()
        # What is said on stderr; not below the root, whose bytes are counted.
        self._errors = self._ending.enter_context(os.fdopen(os.memfd_create("errors"), "w+b"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for name in registry.list_ids(str(self.root)):
                self.cli("delete", "--force", name)
        finally:
            self._ending.close()
            shutil.rmtree(self.root)

    def load(self) -> Config:
        """Read the configuration, for what is measured without the CLI."""
        return load(self.configuration)[0]

    def cli(self, *arguments: str) -> str:
        """Run the CLI and return its stdout; raises RuntimeError."""
        done = subprocess.run(
            [CLI, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        if done.returncode:
            raise self.failure(f"a command ended with status {done.returncode}")
        return done.stdout

    def time(self, command: list[str]) -> float:
        """Return the seconds from the start of a process to its end; raises RuntimeError when it fails."""
        began = time.perf_counter()
        self.wait(self.spawn(command))
        return time.perf_counter() - began

    def spawn(self, command: list[str]) -> int:
        """Start a process whose stdout is of no interest, and return its pid."""
        actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._errors.fileno(), 2),
        ]
        return os.posix_spawn(command[0], command, self.environment, file_actions=actions)

    def wait(self, pid: int) -> None:
        """Wait for a process of `spawn`; raises RuntimeError when it failed."""
        _, status = os.waitpid(pid, 0)
        if status:
            raise self.failure(f"a command ended with status {os.waitstatus_to_exitcode(status)}")

    def start_factory(self) -> Factory:
        """Start `kata-runtime factory init`, which ends with this place; return it at work."""
        process = subprocess.Popen(
            [CLI, "factory", "init"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )
        self._ending.callback(_end, process)
        factory = Factory(process.pid, self._endpoint, self._cache)
        factory.until_full()
        # The first shim of the zygote, and the template.
        self.cli("run", "--detach", "first")
        self.cli("delete", "--force", "first")
        factory.until_full()
        return factory

    def failure(self, what: str) -> RuntimeError:
        """Return an error with the last that CLI and factory have said."""
        size = os.fstat(self._errors.fileno()).st_size
        said = os.pread(self._errors.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        return RuntimeError(f"{what}; the last that was said:\n{said}")


class Factory:
    """A factory that serves."""

    def __init__(self, pid: int, endpoint: Path, wanted: int) -> None:
        self.pid = pid
        self._endpoint = endpoint
        self._wanted = wanted

    def until_full(self) -> dict[str, Any]:
        """Wait until it listens and no VM is missing; return its status."""
        with self._connect() as connection:
            connection.sendall(b'{"id":1,"method":"factory.watch"}\n')
            with connection.makefile() as lines:
                for line in lines:
                    status: dict[str, Any] = json.loads(line)["progress"]
                    if status["ready"] >= self._wanted and not status["making"] and status["zygote"]:
                        return status
        raise RuntimeError("the factory ended")

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(PATIENCE)
                connection.connect(str(self._endpoint))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _configured(text: str, fields: Mapping[str, object]) -> str:
    for name, value in fields.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {json.dumps(value)}", text)
        if count != 1:
            raise RuntimeError(f"configuration.toml has {count} lines for {name}")
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE)
