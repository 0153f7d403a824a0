"""Control groups: whoever is moved into ours is counted, limited and ended with us (cgroups(7))."""

from __future__ import annotations

from pathlib import Path

from kata_shim.errors import ShimError


def adopt(pid: int) -> str:
    """Move a process into our own group of every hierarchy; return what hindered it, "" for nothing."""
    trouble = ""
    try:
        theirs = groups(pid)
    except OSError:  # it has ended
        return ""
    for hierarchy, group in groups("self").items():
        if theirs.get(hierarchy) == group:
            continue
        try:
            (directory(hierarchy, group) / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            trouble = f"{error.filename}: {error.strerror}"
        except ShimError as error:
            trouble = error.message
    return trouble


def groups(process: int | str) -> dict[str, str]:
    """Return a process's group in each hierarchy, which is named by its controllers; "" is version 2."""
    lines = Path(f"/proc/{process}/cgroup").read_text().splitlines()
    return {controllers: group for _, controllers, group in (line.split(":", 2) for line in lines)}


def directory(hierarchy: str, group: str) -> Path:
    """Return where a group can be seen; a mount may show only a part of its hierarchy, or be covered itself.

    Raises ShimError `failed-precondition` where it cannot.
    """
    wanted = set(hierarchy.split(",")) if hierarchy else set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, mounted = fields.split()[3:5]
        fits = kind == "cgroup" and wanted <= set(options.split(",")) if wanted else kind == "cgroup2"
        if fits and Path(group).is_relative_to(root):
            found = Path(mounted) / Path(group).relative_to(root)
            if found.is_dir():
                return found
    raise ShimError("failed-precondition", f"the control group {hierarchy}:{group} is not mounted")
