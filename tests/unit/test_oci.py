"""What becomes of a config.json on its way to the guest, rule by rule, and of one that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kata_shim.agent_containers import from_json
from kata_shim.contract import oci
from kata_shim.errors import ShimError
from kata_shim.protos import oci_pb2
from kata_shim.sandbox import hooks

pytestmark = pytest.mark.quick

# How long an example takes says how busy the host is.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Json = dict[str, Any]
PROCESS = {"args": ["sh"], "cwd": "/", "user": {"uid": 1, "gid": 2}}


def adapted(seccomp: bool = False, **spec: object) -> Json:
    """The guest's config.json."""
    return oci.adapt(oci.read({"process": PROCESS, **spec}), "/guest/rootfs", shared, seccomp=seccomp)[0]


def shared(path: str, readonly: bool) -> str:
    """Where the guest would see a path of the host's."""
    return f"/guest{path}{' ro' if readonly else ''}"


def mounts(*given: Json) -> list[Json]:
    """What becomes of mounts."""
    found: list[Json] = adapted(mounts=list(given))["mounts"]
    return found


def test_the_process_is_the_same_but_for_the_hosts_labels() -> None:
    process = {**PROCESS, "env": ["A=b"], "capabilities": {"bounding": ["CAP_KILL"]}, "oomScoreAdj": 3}
    labels = {"apparmorProfile": "docker-default", "selinuxLabel": "system_u:system_r:x:s0"}
    assert adapted(process={**process, **labels})["process"] == process


@pytest.mark.parametrize("readonly", [True, False])
def test_root_is_the_guests(readonly: bool) -> None:
    assert adapted(root={"path": "/host", "readonly": readonly})["root"] == {
        "path": "/guest/rootfs",
        "readonly": readonly,
    }


@pytest.mark.parametrize(("root", "path"), [({}, "rootfs"), ({"path": "r"}, "r"), ({"path": "/r"}, "/r")])
def test_where_the_root_is(root: Json, path: str) -> None:
    assert oci.read({"process": PROCESS, "root": root}).rootfs == path


def test_what_is_kept() -> None:
    kept: Json = {
        "hostname": "pod",
        "annotations": {"io.kubernetes.cri.sandbox-id": "s"},
    }
    found = adapted(**kept)
    assert {name: found[name] for name in kept} == kept


def test_a_bundle_of_a_later_version_is_one_for_the_guests_runtime() -> None:
    assert adapted(ociVersion="1.1.0+dev")["ociVersion"] == "1.0.2"


def test_what_of_linux_is_kept() -> None:
    kept = {
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "rootfsPropagation": "private",
    }
    left_out = {
        "cgroupsPath": "/k8s/x",
        "devices": [{"path": "/dev/sda"}],
        "mountLabel": "x",
        "uidMappings": [],
    }
    found = adapted(linux={**kept, **left_out})["linux"]
    assert found.keys() == {*kept, "namespaces", "resources"}
    assert {name: found[name] for name in kept} == kept


def test_hooks_stay_on_the_host() -> None:
    given = {"prestart": [{"path": "/hook"}]}
    assert "hooks" not in adapted(hooks=given)
    assert oci.read({"process": PROCESS, "hooks": given}).hooks == given


@pytest.mark.parametrize("seccomp", [True, False])
def test_seccomp_as_configured(seccomp: bool) -> None:
    filters = {"defaultAction": "SCMP_ACT_ERRNO"}
    found = adapted(seccomp, linux={"seccomp": filters})["linux"].get("seccomp")
    assert found == (filters if seccomp else None)


def test_namespaces() -> None:
    """Those of the host mean nothing in the guest; what a container needs of its own it has, asked or not."""
    given = [
        {"type": name, "path": f"/proc/1/ns/{name}"} for name in ("network", "user", "time", "ipc", "uts")
    ]
    found = adapted(linux={"namespaces": [*given, {"type": "mount"}]})["linux"]["namespaces"]
    assert sorted(one["type"] for one in found) == ["cgroup", "ipc", "mount", "pid", "uts"]
    assert all(one.keys() == {"type"} for one in found)


@pytest.mark.parametrize(
    ("namespaces", "together"),
    [([{"type": "pid"}], False), ([{"type": "pid", "path": "/proc/7/ns/pid"}], True), ([], True)],
)
def test_pids_of_a_pod(namespaces: list[Json], together: bool) -> None:
    bundle = oci.read({"process": PROCESS, "linux": {"namespaces": namespaces}})
    assert oci.adapt(bundle, "/", shared, seccomp=False)[1] == together


def test_limits() -> None:
    given: Json = {
        "memory": {"limit": 1 << 20},
        "cpu": {"quota": 50000, "period": 100000, "cpus": "0-3", "mems": "0"},
        "pids": {"limit": 9},
        "blockIO": {"weight": 10},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
        "network": {"classID": 1},
    }
    kept = {"memory": {"limit": 1 << 20}, "cpu": {"quota": 50000, "period": 100000}, "pids": {"limit": 9}}
    assert oci.resources(given) == kept
    devices = [{"allow": False, "access": "rwm"}]
    assert adapted(linux={"resources": given})["linux"]["resources"] == {**kept, "devices": devices}
    assert given["cpu"]["cpus"] == "0-3"  # what was given is as it was


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ([], False),
        ([{"allow": False, "access": "rwm"}], False),
        (
            [{"allow": False, "access": "rwm"}, {"allow": True, "type": "b", "major": 8, "access": "rwm"}],
            False,
        ),
        ([{"allow": True, "type": "c", "access": "rwm"}], False),
        ([{"allow": True, "access": "rwm"}], True),
        ([{"allow": True, "type": "a", "major": -1, "minor": -1, "access": "rwm"}], True),
    ],
)
def test_devices_all_or_those_of_any_container(rules: list[Json], allowed: bool) -> None:
    found = adapted(linux={"resources": {"devices": rules}})["linux"]["resources"]["devices"]
    assert found == [{"allow": allowed, "access": "rwm"}]


@pytest.mark.parametrize(
    "mount",
    [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": []},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=64m"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
    ],
)
def test_the_guests_own_file_systems(mount: Json) -> None:
    assert mounts(mount) == [mount]


@pytest.mark.parametrize("kind", [{"type": "bind"}, {"options": ["bind"]}, {"options": ["rbind"]}])
def test_a_bind_mount_is_shared(kind: Json) -> None:
    (found,) = mounts({"destination": "/data", "source": "/host/data", **kind})
    assert (found["type"], found["source"]) == ("bind", "/guest/host/data")


def test_options_of_a_bind_mount() -> None:
    options = ["rbind", "ro", "nosuid", "nodev", "noexec"]
    given = [*options, "rprivate", "rslave", "shared", "unbindable"]
    (found,) = mounts({"destination": "/data", "type": "bind", "source": "/d", "options": given})
    assert (found["options"], found["source"]) == (options, "/guest/d ro")


@pytest.mark.parametrize("source", ["/proc", "/sys/fs/cgroup", "/dev/null", "/dev"])
def test_what_the_guest_has_of_its_own_is_not_shared(source: str) -> None:
    assert mounts({"destination": "/data", "type": "bind", "source": source}) == []


@pytest.mark.parametrize("source", ["/process", "/system/x", "/device"])
def test_what_only_begins_alike_is(source: str) -> None:
    assert [one["source"] for one in mounts({"destination": "/d", "type": "bind", "source": source})] == [
        f"/guest{source}"
    ]


def test_memory_that_a_pod_shares() -> None:
    shm = {"destination": "/dev/shm", "type": "bind", "source": "/run/shm", "options": ["rbind"]}
    assert [one["source"] for one in mounts(shm)] == [oci.SANDBOX_SHM]
    assert oci.read({"process": PROCESS, "mounts": [shm]}).shm == "/run/shm"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "not an object"),
        ([], "not an object"),
        ({}, "process.args: missing"),
        ({"process": 7}, "process: not an object"),
        ({"process": {"args": []}}, "process.args: missing"),
        ({"process": {"args": "sh"}}, "process.args: not an array of strings"),
        ({"process": {"args": [7]}}, "process.args: not an array of strings"),
        ({"process": PROCESS, "root": "/"}, "root: not an object"),
        ({"process": PROCESS, "root": {"path": 7}}, "root.path: 7 is not a string without NUL"),
        ({"process": PROCESS, "root": {"path": "a\0b"}}, "root.path: "),
        ({"process": PROCESS, "linux": []}, "linux: not an object"),
        ({"process": PROCESS, "mounts": {}}, "mounts: not an array of objects"),
        ({"process": PROCESS, "mounts": ["/x"]}, "mounts: not an array of objects"),
        ({"process": PROCESS, "mounts": [{}]}, "mounts: destination: "),
        ({"process": PROCESS, "mounts": [{"destination": "x"}]}, 'mounts: destination: "x" is not absolute'),
        ({"process": PROCESS, "mounts": [{"destination": "/x\0"}]}, "mounts: destination: "),
        (
            {"process": PROCESS, "mounts": [{"destination": "/x", "options": "ro"}]},
            "mounts: options: not an array",
        ),
        ({"process": PROCESS, "mounts": [{"destination": "/x", "type": ["bind"]}]}, "mounts: type: "),
        ({"process": PROCESS, "mounts": [{"destination": "/x", "type": "bind"}]}, "mounts: source: "),
        (
            {"process": PROCESS, "mounts": [{"destination": "/x", "type": "bind", "source": "x"}]},
            "mounts: source: ",
        ),
        ({"process": PROCESS, "linux": {"namespaces": ["pid"]}}, "linux.namespaces: not an array of objects"),
        ({"process": PROCESS, "linux": {"namespaces": [{}]}}, "linux.namespaces: type: missing"),
        ({"process": PROCESS, "linux": {"namespaces": [{"type": []}]}}, "linux.namespaces: type: "),
        ({"process": PROCESS, "linux": {"resources": 1}}, "resources: not an object"),
        ({"process": PROCESS, "linux": {"resources": {"cpu": "1"}}}, "cpu: not an object"),
        (
            {"process": PROCESS, "linux": {"resources": {"devices": [1]}}},
            "linux.resources.devices: not an array",
        ),
        ({"process": PROCESS, "hooks": []}, "hooks: not an object"),
        ({"process": PROCESS, "annotations": ""}, "annotations: not an object"),
    ],
)
def test_refused_by_its_field(spec: object, message: str) -> None:
    with pytest.raises(ShimError) as raised:
        oci.adapt(oci.read(spec), "/", shared, seccomp=True)
    assert raised.value.code == "invalid-argument"
    assert raised.value.message.startswith(f"config.json: {message}")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (None, "not an object"),
        ({}, "path: null is not absolute"),
        ({"path": "hook"}, 'path: "hook" is not absolute'),
        ({"path": "/a\0"}, "path: "),
        ({"path": "/a", "args": "a"}, "args: not an array of strings without NUL"),
        ({"path": "/a", "args": ["a", 1]}, "args: not an array of strings without NUL"),
        ({"path": "/a", "env": ["A=\0"]}, "env: not an array of strings without NUL"),
        ({"path": "/a", "timeout": "1"}, 'timeout: "1" is not within 1..3600'),
        ({"path": "/a", "timeout": -1}, "timeout: -1 is not within 1..3600"),
        ({"path": "/a", "timeout": True}, "timeout: true is not within 1..3600"),
        ({"path": "/a", "timeout": 0.5}, "timeout: "),
    ],
)
def test_hooks_that_are_none(hook: object, message: str) -> None:
    with pytest.raises(ShimError) as raised:
        hooks.check(hook)
    assert raised.value.message.startswith(f"config.json: hooks: {message}")


def test_hook_as_given() -> None:
    given = {"path": "/a", "args": ["b", "c"], "env": ["A=b=c", "D", "=x"], "timeout": 3}
    assert hooks.check(given) == hooks.Hook("/a", ["b", "c"], {"A": "b=c", "D": ""}, 3)
    assert hooks.check({"path": "/a"}) == hooks.Hook("/a", ["/a"], {}, hooks.TIMEOUT)


NAMES = [
    *("process", "args", "env", "cwd", "user", "uid", "terminal", "consoleSize", "capabilities", "bounding"),
    *(
        "root",
        "path",
        "readonly",
        "mounts",
        "destination",
        "source",
        "type",
        "options",
        "linux",
        "namespaces",
    ),
    *("resources", "memory", "limit", "cpu", "quota", "period", "cpus", "pids", "devices", "allow", "major"),
    *("seccomp", "syscalls", "names", "sysctl", "maskedPaths", "hooks", "prestart", "timeout", "annotations"),
    *("hostname", "ociVersion", "rlimits", "rootfsPropagation"),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["bind", "rbind", "pid", "/dev/shm", "/x", "ro", "a", ""])
    | st.text(max_size=8)
)
JSON = st.recursive(
    LEAVES,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.sampled_from(NAMES), some, max_size=6),
    max_leaves=40,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=8)
SPECS = st.fixed_dictionaries(
    {"process": OBJECTS | st.just(PROCESS)},
    optional={
        "mounts": st.lists(OBJECTS, max_size=3) | JSON,
        "linux": OBJECTS,
        "root": OBJECTS,
        "hooks": OBJECTS,
        "annotations": JSON,
        "hostname": JSON,
        "ociVersion": JSON,
    },
)


def into_messages(spec: object, *, seccomp: bool) -> None:
    """Do all with a config.json that is done before it goes to the guest."""
    bundle = oci.read(spec)
    for wanted in bundle.hooks.values():
        for hook in wanted if isinstance(wanted, list) else []:
            hooks.check(hook)
    assert isinstance(bundle.shm, str)
    assert min(bundle.wants) >= 0
    found, _ = oci.adapt(bundle, "/guest/rootfs", shared, seccomp=seccomp)
    from_json(oci_pb2.Spec, found, "config.json")


def code_of(work: Callable[[], object]) -> str:
    """The code of what is raised; "" where nothing is."""
    try:
        work()
    except ShimError as error:
        return error.code
    return ""


@unhurried
@given(SPECS | JSON, st.booleans())
def test_no_json_does_more_than_be_refused(spec: object, seccomp: bool) -> None:
    assert code_of(lambda: into_messages(spec, seccomp=seccomp)) in ("", "invalid-argument")


@unhurried
@given(OBJECTS)
def test_nor_do_limits(limits: Json) -> None:
    work = lambda: from_json(oci_pb2.LinuxResources, oci.resources(limits), "resources")  # noqa: E731
    assert code_of(work) in ("", "invalid-argument")
    assert code_of(lambda: oci.wants(limits)) in ("", "invalid-argument")
