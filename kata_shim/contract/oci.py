"""An OCI bundle's config.json, made into one for the guest, as the Kata runtime does it. Pure.

The guest has devices, control groups and networks of its own; of the host's it sees only what is shared with
it. Names: github.com/opencontainers/runtime-spec, config.md and config-linux.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from kata_shim.errors import invalid
from kata_shim.quoting import quoted

_NOT_IN_THE_GUEST = frozenset({"network", "user", "time"})  # namespaces
_KEPT_RESOURCES = frozenset({"memory", "cpu", "pids"})
_OF_THE_HOSTS_PROCESSORS = ("cpus", "mems")
_OF_THE_SYSTEM = ("/proc", "/sys", "/dev")  # the guest has its own below these
_SHM = "/dev/shm"
SANDBOX_SHM = "/run/kata-containers/sandbox/shm"  # the guest's, of all containers of a pod, where Kata has it
_PROPAGATION = frozenset(
    {"private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"}
)

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SAFE = ("nosuid", "noexec", "nodev")
_PTS = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP"),
        *("SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
]
_MASKED = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

# Of what the guest's runtime is given, whatever the bundle says: Debian 12's crun refuses 1.1.
_OCI_VERSION = "1.0.2"

Json = dict[str, Any]
_T = TypeVar("_T")
_KINDS: dict[type, str] = {str: "strings", dict: "objects"}
Share = Callable[[str, bool], str]  # a path of the host's, and whether to be read only -> the guest's path


class Wants(NamedTuple):
    """What a container may use, as far as it is limited: thousandths of a processor, bytes of memory."""

    cpu: int = 0
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a shim has to know of a config.json."""

    spec: Json
    rootfs: str  # where it lies, from the bundle's directory
    readonly: bool

    @property
    def hooks(self) -> Json:
        """The hooks, which are the host's business."""
        return _object(self.spec, "hooks")

    @property
    def wants(self) -> Wants:
        """What the container may use."""
        return wants(_object(_object(self.spec, "linux"), "resources"))

    @property
    def shm(self) -> str:
        """The host's directory that is to be /dev/shm; "" where the container has its own."""
        for mount in self.spec.get("mounts") or []:
            if mount.get("destination") == _SHM and _is_bind(mount):
                return str(mount.get("source", ""))
        return ""


def default_spec(rootfs: str, args: list[str], env: list[str], cwd: str, *, terminal: bool) -> Json:
    """Return the config.json of a container that was given no more than that.

    Its rights are those that container engines give by default (moby's profile of capabilities).
    """
    system = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": [*_SAFE[:1], "mode=755"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": _PTS},
        {"destination": _SHM, "type": "tmpfs", "source": "shm", "options": [*_SAFE, "mode=1777"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": [*_SAFE]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_SAFE, "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*_SAFE, "ro"]},
    ]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": [_PATH, *env],
            "cwd": cwd or "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
            "noNewPrivileges": True,
        },
        "root": {"path": rootfs},
        "mounts": system,
        "linux": {"maskedPaths": _MASKED, "readonlyPaths": _READ_ONLY},
    }


def read(spec: object) -> Bundle:
    """Check what is used of a config.json; raises ShimError `invalid-argument` that names the field."""
    if not isinstance(spec, dict):
        raise invalid("config.json: not an object")
    process, root, linux = (_object(spec, name) for name in ("process", "root", "linux"))
    if not _array(process, "args", str, "process."):
        raise invalid("config.json: process.args: missing")
    for mount in _array(spec, "mounts", dict):
        for name in ("destination", "source", "type"):
            _text(mount, name, "mounts: ")
        _array(mount, "options", str, "mounts: ")
    for namespace in _array(linux, "namespaces", dict, "linux."):
        if not _text(namespace, "type", "linux.namespaces: "):
            raise invalid("config.json: linux.namespaces: type: missing")
        _text(namespace, "path", "linux.namespaces: ")
    limits = _object(linux, "resources")
    _array(limits, "devices", dict, "linux.resources.")
    for name in _KEPT_RESOURCES:
        _object(limits, name)
    for name in ("hooks", "annotations"):
        _object(spec, name)
    return Bundle(spec, _text(root, "path", "root.") or "rootfs", bool(root.get("readonly")))


def adapt(bundle: Bundle, rootfs: str, share: Share, *, seccomp: bool) -> tuple[Json, bool]:
    """Return the specification for the guest, and whether its processes share the pod's PIDs.

    `rootfs` is the guest's path of the root file system; `share` is called for each mount that is the host's.
    """
    spec = bundle.spec
    process = {
        name: value
        for name, value in _object(spec, "process").items()
        if name not in ("apparmorProfile", "selinuxLabel")
    }
    linux = _object(spec, "linux")
    namespaces, shares_pids = _namespaces(linux.get("namespaces") or [])
    adapted: Json = {
        "ociVersion": _OCI_VERSION,
        "process": process,
        "root": {"path": rootfs, "readonly": bundle.readonly},
        "hostname": str(spec.get("hostname") or ""),
        "annotations": _object(spec, "annotations"),
        "mounts": [made for mount in spec.get("mounts") or [] if (made := _mount(mount, share))],
        "linux": {
            "namespaces": namespaces,
            "resources": {
                **resources(_object(linux, "resources")),
                "devices": _device_rules(_object(linux, "resources")),
            },
            **{
                name: linux[name]
                for name in ("sysctl", "maskedPaths", "readonlyPaths", "rootfsPropagation")
                if linux.get(name)
            },
        },
    }
    if seccomp and linux.get("seccomp"):
        adapted["linux"]["seccomp"] = linux["seccomp"]
    return adapted, shares_pids


def resources(given: Json) -> Json:
    """Return the limits that hold in the guest; processors and devices of the host mean nothing there."""
    kept = {name: dict(value) for name in _KEPT_RESOURCES if (value := _object(given, name))}
    for name in _OF_THE_HOSTS_PROCESSORS:
        kept.get("cpu", {}).pop(name, None)
    return kept


def _device_rules(given: Json) -> list[Json]:
    """Return which of the guest's devices may be opened, beyond those that each container has anyway.

    All for a container that may have all of the host's, else none: the guest's memory is one (CVE-2020-2023).
    """
    everything = False
    for one in given.get("devices") or []:
        if one.get("type") in (None, "", "a") and one.get("major") in (None, -1):
            everything = bool(one.get("allow")) and set(one.get("access") or "rwm") == set("rwm")
    return [{"allow": everything, "access": "rwm"}]


def wants(given: Json) -> Wants:
    """Return what such resources let a container use; of what is not limited, nothing. Raises ShimError."""
    cpu, memory = _object(given, "cpu"), _object(given, "memory")
    try:
        quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 0)
        limit = int(memory.get("limit") or 0)
    except (TypeError, ValueError):
        raise invalid("resources: cpu.quota, cpu.period and memory.limit: not all are integers") from None
    return Wants(-(-quota * 1000 // period) if quota > 0 and period > 0 else 0, max(0, limit))


def _namespaces(given: list[Json]) -> tuple[list[Json], bool]:
    kept = [{"type": one["type"]} for one in given if one.get("type") not in _NOT_IN_THE_GUEST]
    shares_pids = any(one.get("type") == "pid" and one.get("path") for one in given)
    # Without one of its own it would have the guest's: the agent's, and every other container's. A host with
    # control groups of version 1 asks for none of those; the guest has version 2.
    for name in ("pid", "mount", "ipc", "uts", "cgroup"):
        if {"type": name} not in kept:
            kept.append({"type": name})
            shares_pids = shares_pids or name == "pid"
    return kept, shares_pids


def is_of_the_system(path: str) -> bool:
    """Return whether a plain path is that of /proc, /sys or /dev, or below it: the guest has its own."""
    return any(f"{path}/".startswith(f"{name}/") for name in _OF_THE_SYSTEM)


def _is_bind(mount: Json) -> bool:
    options = mount.get("options") or []
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def _mount(mount: Json, share: Share) -> Json | None:
    destination, options = str(mount.get("destination", "")), [str(one) for one in mount.get("options") or []]
    if not destination.startswith("/"):
        raise invalid(f"config.json: mounts: destination: {quoted(destination)} is not absolute")
    is_bind = _is_bind(mount)
    if destination == _SHM and is_bind:
        return {"destination": _SHM, "type": "bind", "source": SANDBOX_SHM, "options": ["bind", *_SAFE]}
    if not is_bind:
        return {**mount, "options": options}
    source = str(mount.get("source", ""))
    if not source.startswith("/"):
        raise invalid(f"config.json: mounts: source: {quoted(source)} is not absolute")
    if is_of_the_system("/" + os.path.normpath(source).lstrip("/")):
        return None
    options = [one for one in options if one not in _PROPAGATION]
    return {
        "destination": destination,
        "type": "bind",
        "source": share(source, not {"ro", "rro"}.isdisjoint(options)),
        "options": options,
    }


def _object(given: Json, name: str) -> Json:
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"config.json: {name}: not an object")
    return value


def _text(given: Json, name: str, where: str) -> str:
    value = given.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise invalid(f"config.json: {where}{name}: {quoted(value)} is not a string without NUL")
    return value


def _array(given: Json, name: str, kind: type[_T], where: str = "") -> list[_T]:
    value = given.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, kind) for one in value):
        raise invalid(f"config.json: {where}{name}: not an array of {_KINDS[kind]}")
    return value
