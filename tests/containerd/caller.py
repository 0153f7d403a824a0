"""What containerd does with a shim, by hand: so that it can be done wrongly, too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from kata_shim.containerd import task_pb2
from kata_shim.contract import oci
from kata_shim.ttrpc.client import Client
from tests.started import PATIENCE
from tests.support import BIN, TASK_SOCKETS, Result, environment

SERVICE = "containerd.task.v2.Task"
SHIM = str(BIN / "containerd-shim-kata-v2")
METHODS = task_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name


@dataclass
class Caller:
    """Bundles in a directory, and shims for them."""

    directory: Path
    root: Path
    config: Path

    @property
    def environment(self) -> dict[str, str]:
        """What containerd gives to a shim; nobody listens for events."""
        return {**environment(self.root, self.config), "TTRPC_ADDRESS": f"{self.directory}/events.sock"}

    def bundle(self, name: str, rootfs: str = "rootfs", *args: str, **changes: Any) -> Path:
        """Make a bundle."""
        directory = self.directory / name
        (directory / "rootfs").mkdir(parents=True)
        spec = oci.default_spec(rootfs, list(args) or ["/bin/true"], [], "", terminal=False)
        (directory / "config.json").write_text(json.dumps({**spec, **changes}))
        return directory

    def flags(self, container_id: str) -> list[str]:
        """The command line, without a command."""
        address = f"{self.directory}/containerd.sock"
        return [
            SHIM,
            "-namespace",
            "hostile",
            "-address",
            address,
            "-publish-binary",
            "/x",
            "-id",
            container_id,
        ]

    def start(self, container_id: str, bundle: Path, stdin: bytes = b"") -> Result:
        """Call `start`."""
        return _run([*self.flags(container_id), "start"], bundle, self.environment, stdin)

    def delete(self, container_id: str, bundle: Path) -> Result:
        """Call `delete`; assert that it answers as it should."""
        words = [*self.flags(container_id), "-bundle", str(bundle), "delete"]
        done = subprocess.run(words, cwd=bundle, env=self.environment, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        assert task_pb2.DeleteResponse.FromString(done.stdout).exit_status == 137
        return Result(done.returncode, "", "")

    def socket(self, container_id: str) -> Path:
        """Where its shim listens."""
        key = f"{self.directory}/containerd.sock/hostile/{container_id}"
        return Path(TASK_SOCKETS, sha256(key.encode()).hexdigest())

    @contextmanager
    def started(self, container_id: str, bundle: Path) -> Iterator[Path]:
        """Start a shim, yield its socket, and have all deleted."""
        done = self.start(container_id, bundle)
        assert done == Result(0, f"unix://{self.socket(container_id)}", "")
        try:
            yield self.socket(container_id)
        finally:
            self.delete(container_id, bundle)
            assert not os.path.lexists(self.socket(container_id))


async def call(client: Client, name: str, timeout: float | None = PATIENCE, **fields: Any) -> Any:
    """Call a method of a shim's task service."""
    method = METHODS[name]
    request: Message = GetMessageClass(method.input_type)(**fields)
    return await client.call(SERVICE, name, request, GetMessageClass(method.output_type), timeout)


def _run(words: list[str], cwd: Path, environment: dict[str, str], stdin: bytes) -> Result:
    done = subprocess.run(words, cwd=cwd, env=environment, input=stdin, capture_output=True, timeout=PATIENCE)
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())
