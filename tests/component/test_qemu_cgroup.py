"""A QEMU that a factory has started is counted, limited and ended with its sandbox's shim."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu.cgroup import adopt, directory, groups
from tests.cgroups import cgroups

pytestmark = pytest.mark.quick


def test_a_process_is_moved_into_our_groups(tmp_path: Path) -> None:
    ours = groups("self")
    with cgroups(tmp_path) as others, subprocess.Popen(["/bin/sleep", "60"]) as process:
        for group in others:
            (group / "cgroup.procs").write_text(str(process.pid))
        assert [name for name in ours if groups(process.pid)[name] != ours[name]]
        assert adopt(process.pid) == ""
        assert groups(process.pid) == ours
        assert adopt(process.pid) == ""
        process.kill()
        process.wait()
        assert adopt(process.pid) == ""


def test_a_group_is_where_its_hierarchy_is_mounted(tmp_path: Path) -> None:
    with cgroups(tmp_path) as others:
        assert directory("", f"/{others[0].name}").samefile(others[0])
    with pytest.raises(ShimError, match=r"the control group pids,nonsense:/a/b is not mounted"):
        directory("pids,nonsense", "/a/b")
