"""A host of the tests' own: a sandbox with KVM and vsock to give away, whatever the real host has.

Its QEMU emulates a CPU with AMD's SVM, so that guest code runs as fast in a QEMU inside as outside: a boot
there takes half a minute; it took nine where emulation emulated emulation. It sees the real host's files
by 9p, what it writes stays in its memory, and it is driven by `kata-runtime exec`. It has one virtual CPU:
where one patches the kernel's code, as KVM has it done, QEMU 7.2 has another now and then go on with the old.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import Guest, Result, Runtime
from tests.system.network import booted

PROJECT = Path(__file__).resolve().parent.parent.parent
PACKAGES = Path("/var/cache/kata-shim/packages")  # scripts/build-guest's; the guest itself has no use for KVM
KVM = ("irqbypass", "kvm", "ccp", "kvm-amd")  # in the order they need each other
# A timer that goes on by itself: of one that is set for each next time a single interrupt that gets lost, as
# QEMU 7.2's SVM loses some, leaves the guest inside with the CPU for ever.
HOST: dict[str, int | str] = {
    "default_vcpus": 1,
    "default_maxvcpus": 1,
    "default_memory": 2048,
    "kernel_params": "nohz=off highres=off",
}

QEMU = """#!/bin/sh
exec qemu-system-x86_64 "$@" \\
    -fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap \\
    -device virtio-9p-pci,fsdev=host,mount_tag=host
"""

BECOME_A_HOST = """
set -e
modprobe -a 9pnet_virtio 9p overlay tun
mkdir /lower /upper /host
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose,ro host /lower
mount -t tmpfs tmpfs /upper
mkdir /upper/new /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/new,workdir=/upper/work overlay /host
for tree in dev proc sys; do mount --rbind /$tree /host/$tree; done
for module; do insmod "/host$module"; done
"""


@dataclass(frozen=True)
class Nested(Runtime):
    """`kata-runtime` with the outer guest as its host, on that one's own root of state."""

    outer: Guest

    def command(self, *arguments: str) -> list[str]:
        """The command line of a call: exec in the outer guest."""
        setting = f"KATA_SHIM_CONFIG={self.config}"
        words = [
            "chroot",
            "/host",
            "env",
            "KATA_SHIM_ROOT=/run/nested",
            setting,
            *super().command(*arguments),
        ]
        return self.outer.runtime.command("exec", self.outer.id, "--", *words)

    def shell(self, script: str, *arguments: str) -> Result:
        """Run a shell script on the outer guest."""
        return self.outer.run("chroot", "/host", "sh", "-c", script, "sh", *arguments)

    def kill(self, pid: int) -> Result:
        """End a process of the outer guest by SIGKILL, and wait until it has ended."""
        program = f"from tests.started import kill; kill({pid})"
        path = f"PYTHONPATH={PROJECT}"
        return self.outer.run("chroot", "/host", "env", path, sys.executable, "-c", program)


@contextmanager
def host(runtime: Runtime, directory: Path, config: Path) -> Iterator[Nested]:
    """Boot a guest that can run sandboxes; `directory` is for what it needs, `config` is theirs."""
    qemu = directory / "qemu"
    qemu.write_text(QEMU)
    qemu.chmod(0o755)
    with booted(runtime, directory, "host", path=str(qemu), **HOST) as outer:
        modules = kvm_modules(outer.run("uname", "-r").stdout.strip(), directory)
        made = outer.run("sh", "-c", BECOME_A_HOST, "sh", *map(str, modules))
        assert made == Result(0, "", "")
        yield Nested(runtime.root, config, outer)


def kvm_modules(release: str, directory: Path) -> list[Path]:
    """Take the modules out of the package that the guest's kernel is from."""
    (package,) = PACKAGES.glob(f"linux-image-{release}_*.deb")
    script = 'dpkg-deb --fsys-tarfile "$0" | tar -x --transform "s:.*/::" --wildcards "$@"'
    patterns = [f"*/{name}.ko" for name in KVM]
    command = ["bash", "-o", "pipefail", "-c", script, str(package), *patterns]
    subprocess.run(command, cwd=directory, check=True)
    return [directory / f"{name}.ko" for name in KVM]
