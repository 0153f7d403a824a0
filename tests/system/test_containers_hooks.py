"""The guest's own hooks: programs below guest_hook_path, which the guest's OCI runtime runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kata_shim import shims
from kata_shim.errors import ShimError
from tests.rootfs import make_rootfs
from tests.started import write_config
from tests.support import Guest, Result, Runtime

KINDS = ["prestart", "createRuntime", "poststart", "poststop"]
# Two in each, one of which is no program; a hook hears of its container on stdin.
HOOKS = f"""
for kind in {" ".join(KINDS)}; do
    mkdir -p /opt/hooks/$kind
    cat > /opt/hooks/$kind/20-runs << END
#!/bin/sh
echo $kind \\$(grep -o '"id": *"[^"]*"') >> /run/order
END
    chmod 755 /opt/hooks/$kind/20-runs
    echo nothing > /opt/hooks/$kind/10-readme
done
"""


@pytest.fixture
def guest(runtime: Runtime, root: Path, tmp_path: Path) -> Iterator[Guest]:
    """A sandbox without a container, whose guest has hooks."""
    config = write_config(
        tmp_path / "configuration.toml",
        root / "template",
        accelerator="tcg",
        guest_hook_path="/opt/hooks",
    )
    started = Runtime(root, config)
    assert started("run", "--detach", "h1").status == 0
    try:
        guest = Guest(started, "h1")
        assert guest.run("sh", "-c", HOOKS) == Result(0, "", "")
        yield guest
    finally:
        assert started("delete", "--force", "h1") == Result(0, "", "")


@pytest.fixture
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    path = root / "rootfs of hooks"
    return path if path.exists() else make_rootfs(path)


def run(guest: Guest, rootfs: Path, script: str) -> int:
    """Run a container in the sandbox to its end; return its status."""
    params = {"rootfs": str(rootfs), "argv": ["sh", "-c", script], "stdin": False}
    connection = shims.connect(str(guest.runtime.root), guest.id)
    with closing(connection.socket):
        found = connection.call("container.run", json.dumps(params).encode(), lambda _: None)
    return int(json.loads(found)["exit_status"])


def test_each_is_run_when_it_is_due(guest: Guest, rootfs: Path) -> None:
    assert run(guest, rootfs, "exit 3") == 3
    told = guest.run("cat", "/run/order").stdout.splitlines()
    assert [line.split()[0] for line in told] == KINDS
    assert all('"h1"' in line for line in told), told


def test_one_that_fails_hinders_the_container(guest: Guest, rootfs: Path) -> None:
    failing = "printf '#!/bin/sh\\nexit 4\\n' > /opt/hooks/prestart/20-runs"
    assert guest.run("sh", "-c", failing).status == 0
    with pytest.raises(ShimError, match="hook"):
        run(guest, rootfs, "exit 3")
    # Of the container nothing is left that would hinder another one.
    assert guest.run("rm", "-r", "/opt/hooks/prestart").status == 0
    assert run(guest, rootfs, "exit 5") == 5
