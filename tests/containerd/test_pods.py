"""Pods, as a kubelet has containerd's CRI plugin make them: one VM, several containers."""

from __future__ import annotations

import asyncio
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from kata_shim.ttrpc.client import Client
from tests.containerd import api_pb2 as api
from tests.containerd.caller import call
from tests.containerd.cri import HANDLER, Kubelet
from tests.support import Result, Runtime
from tests.system.network import address, nic

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d)")
FOREVER = ("/bin/sleep", "infinity")


def test_life_of_a_pod(node: Kubelet) -> None:
    pod = node.run("a")
    assert node.pods() == {pod.id: "SANDBOX_READY"}
    status = node.cri("PodSandboxStatus", pod_sandbox_id=pod.id).status
    assert (status.state, status.runtime_handler) == (api.SANDBOX_READY, HANDLER)
    container = pod.create("c", *FOREVER)
    assert pod.status(container).state == api.CONTAINER_CREATED
    node.cri("StartContainer", container_id=container)
    running = pod.status(container)
    assert running.state == api.CONTAINER_RUNNING
    assert running.started_at >= running.created_at
    node.cri("StopPodSandbox", pod_sandbox_id=pod.id)
    assert node.pods() == {pod.id: "SANDBOX_NOTREADY"}
    assert (pod.status(container).state, pod.status(container).exit_code) == (api.CONTAINER_EXITED, 137)
    node.cri("StopPodSandbox", pod_sandbox_id=pod.id)  # a kubelet does so more than once
    for _ in range(2):
        node.cri("RemovePodSandbox", pod_sandbox_id=pod.id)
    assert node.pods() == {}
    assert not node.cri("ListContainers").containers
    assert not os.listdir(node.root / "containers")


def test_what_containers_share(node: Kubelet) -> None:
    pod = node.run("a")
    first, second = (pod.start(name, *FOREVER) for name in ("c", "d"))
    kinds = ("net", "ipc", "uts", "pid", "mnt", "cgroup")
    show = f"for kind in {' '.join(kinds)}; do readlink /proc/self/ns/$kind; done"
    ours, theirs = (pod.exec(one, "/bin/sh", "-c", show)[1].split() for one in (first, second))
    assert [kind for kind, one, other in zip(kinds, ours, theirs, strict=True) if one == other] == [
        *("net", "ipc", "uts")
    ]
    assert pod.exec(first, "/bin/sh", "-c", "echo there >/dev/shm/f") == (0, "", "")
    assert pod.exec(second, "cat", "/dev/shm/f") == (0, "there\n", "")
    assert "sleep" not in pod.exec(first, "/bin/sh", "-c", "ps | grep -v ' 1 '")[1]


def test_shared_pids(node: Kubelet) -> None:
    pod = node.run("a", pid=api.POD)
    first = pod.start("c", "/bin/sleep", "11111", pid=api.POD)
    second = pod.start("d", "/bin/sleep", "22222", pid=api.POD)
    seen = pod.exec(first, "ps")[1]
    assert re.search(r" 1 root +/bin/sleep infinity", seen), seen  # the pod's own process
    assert "sleep 11111" in seen
    assert "sleep 22222" in seen
    (number,) = re.findall(r"(\d+) root +/bin/sleep 22222", seen)
    assert pod.exec(first, "kill", "-9", number)[0] == 0
    assert pod.await_end(second).exit_code == 137
    assert pod.status(first).state == api.CONTAINER_RUNNING
    third = pod.start("e", *FOREVER, pid=api.POD)
    assert "sleep 11111" in pod.exec(third, "ps")[1]


def test_exec(node: Kubelet) -> None:
    pod = node.run("a")
    container = pod.start("c", *FOREVER)
    assert pod.exec(container, "/bin/sh", "-c", "echo hello; echo oh >&2; exit 3") == (3, "hello\n", "oh\n")
    assert pod.exec(container, "/bin/true", timeout=30) == (0, "", "")
    with pytest.raises(grpc.RpcError) as refused:
        pod.exec(container, "/bin/sleep", "12345", timeout=1)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "12345" not in pod.exec(container, "ps")[1]
    with pytest.raises(grpc.RpcError, match="nowhere"):
        pod.exec(container, "nowhere")
    large = pod.exec(container, "/bin/sh", "-c", "dd if=/dev/zero bs=1024 count=1024 | tr '\\0' x")
    assert (large[0], large[1]) == (0, "x" * (1 << 20))


def test_logs(node: Kubelet) -> None:
    pod = node.run("a")
    container = pod.start("c", "/bin/sh", "-c", "echo one; echo two >&2; printf three; exit 5")
    status = pod.await_end(container)
    assert (status.state, status.exit_code, status.reason) == (api.CONTAINER_EXITED, 5, "Error")
    assert status.finished_at >= status.started_at
    assert status.log_path == f"{pod.config.log_directory}/c.log"
    lines = pod.await_log("c", 3)
    assert all(TIME.fullmatch(line[0]) for line in lines), lines
    by_stream = [[line[2:] for line in lines if line[1] == stream] for stream in ("stdout", "stderr")]
    assert by_stream == [[["F", "one"], ["P", "three"]], [["F", "two"]]]


def test_stop(node: Kubelet) -> None:
    pod = node.run("a")
    script = 'trap "{}" TERM; touch /tmp/up; while :; do sleep 0.1; done'
    polite = pod.start("c", "/bin/sh", "-c", script.format("exit 9"))
    deaf = pod.start("d", "/bin/sh", "-c", script.format(""))
    for container in (polite, deaf):
        assert pod.exec(container, "/bin/sh", "-c", "until [ -e /tmp/up ]; do sleep 0.05; done")[0] == 0
    node.cri("StopContainer", container_id=polite, timeout=60)
    assert pod.await_end(polite).exit_code == 9
    node.cri("StopContainer", container_id=deaf, timeout=1)
    assert pod.await_end(deaf).exit_code == 137
    node.cri("RemoveContainer", container_id=polite)
    node.cri("RemoveContainer", container_id=deaf)
    again = pod.start("c", *FOREVER)
    node.cri("RemoveContainer", container_id=again)  # though it runs
    assert not node.cri("ListContainers").containers


def test_what_a_container_is_given(node: Kubelet, tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name}\n")
    (tmp_path / "hosts").write_text("192.0.2.1 somewhere\n")
    pod = node.run("a")
    container = pod.start(
        "c",
        *FOREVER,
        mounts=[
            api.Mount(container_path="/rw", host_path=str(tmp_path / "rw")),
            api.Mount(container_path="/data/ro", host_path=str(tmp_path / "ro"), readonly=True),
            api.Mount(container_path="/etc/hosts", host_path=str(tmp_path / "hosts")),
        ],
        envs=[api.KeyValue(key="NAME", value="a value")],
        working_dir="/tmp",
        security={
            "run_as_user": api.Int64Value(value=1000),
            "run_as_group": api.Int64Value(value=2000),
            "supplemental_groups": [3000],
        },
    )
    assert pod.exec(container, "id", "-u") == (0, "1000\n", "")
    assert pod.exec(container, "id", "-G") == (0, "2000 3000\n", "")
    assert pod.exec(container, "/bin/sh", "-c", 'echo "$NAME"; pwd') == (0, "a value\n/tmp\n", "")
    assert pod.exec(container, "cat", "/rw/file", "/data/ro/file", "/etc/hosts") == (
        *(0, "rw\nro\n192.0.2.1 somewhere\n", ""),
    )
    assert "192.0.2.53" in pod.exec(container, "cat", "/etc/resolv.conf")[1]
    assert pod.exec(container, "df", "-k", "/dev/shm")[1].split()[-5] == "65536"
    as_root = pod.start(
        "d",
        *FOREVER,
        mounts=[
            api.Mount(container_path="/rw", host_path=str(tmp_path / "rw")),
            api.Mount(container_path="/ro", host_path=str(tmp_path / "ro"), readonly=True),
        ],
        security={"readonly_rootfs": True},
    )
    assert pod.exec(as_root, "/bin/sh", "-c", "echo new >/rw/new") == (0, "", "")
    assert (tmp_path / "rw/new").read_text() == "new\n"
    for path in ("/ro/new", "/new"):
        status, _, error = pod.exec(as_root, "touch", path)
        assert (status, "Read-only file system" in error) == (1, True), error
    assert os.listdir(tmp_path / "ro") == ["file"]


def test_volumes_that_a_kubelet_makes(node: Kubelet, tmp_path: Path) -> None:
    """A configuration map, replaced by a link's rename, and the file for a container's last words."""
    volume, last_words = tmp_path / "map", tmp_path / "last-words"
    last_words.touch()
    for version in ("1", "2"):
        (volume / version).mkdir(parents=True)
        (volume / version / "key").write_text(f"{version}\n")
    (volume / "..data").symlink_to("1")
    (volume / "key").symlink_to("..data/key")
    pod = node.run("a")
    mounts = [
        api.Mount(container_path="/var/run/secrets/map", host_path=str(volume), readonly=True),
        api.Mount(container_path="/dev/termination-log", host_path=str(last_words)),
    ]
    container = pod.start("c", *FOREVER, mounts=mounts)
    show = ("cat", "/var/run/secrets/map/key")
    assert pod.exec(container, *show) == (0, "1\n", "")
    (volume / "..new").symlink_to("2")
    (volume / "..new").rename(volume / "..data")
    assert pod.exec(container, *show) == (0, "2\n", "")
    assert pod.exec(container, "/bin/sh", "-c", "echo farewell >/dev/termination-log") == (0, "", "")
    assert last_words.read_text() == "farewell\n"


def test_a_container_that_cannot_start(node: Kubelet) -> None:
    pod = node.run("a")
    broken = pod.create("c", "/bin/nothing")
    with pytest.raises(grpc.RpcError, match=r"/bin/nothing.*No such file"):
        node.cri("StartContainer", container_id=broken)
    status = pod.status(broken)
    assert (status.state, status.reason) == (api.CONTAINER_EXITED, "StartError")
    node.cri("RemoveContainer", container_id=broken)
    whole = pod.start("c", *FOREVER)
    assert pod.exec(whole, "/bin/echo", "fine") == (0, "fine\n", "")


def test_stats_and_resources(node: Kubelet) -> None:
    pod = node.run("a")
    given = {"memory_limit_in_bytes": 64 << 20, "cpu_quota": 50000, "cpu_period": 100000}
    container = pod.start("c", *FOREVER, resources=given)
    files = [f"/sys/fs/cgroup/{name}" for name in ("memory.max", "cpu.max")]
    assert pod.exec(container, "cat", *files) == (0, f"{64 << 20}\n50000 100000\n", "")
    used = node.cri("ContainerStats", container_id=container).stats
    assert 0 < used.memory.working_set_bytes.value < 64 << 20
    assert used.cpu.usage_core_nano_seconds.value > 0
    changed = api.LinuxContainerResources(memory_limit_in_bytes=96 << 20, cpu_quota=25000, cpu_period=100000)
    node.cri("UpdateContainerResources", container_id=container, linux=changed)
    assert pod.exec(container, "cat", *files) == (0, f"{96 << 20}\n25000 100000\n", "")


def test_network_by_the_ids(node: Kubelet, runtime: Runtime) -> None:
    pod = node.run("a")
    container = pod.start("c", *FOREVER)
    described = nic(1, IPAddresses=address("172.16.0.3", "16"))
    added = runtime("kata-network", "add-iface", pod.id[:12], "-", stdin=json.dumps(described))
    assert added.status == 0, added
    listed = [runtime("kata-network", "list-ifaces", one) for one in (pod.id, container, container[:12])]
    assert [one.status for one in listed] == [0, 0, 0], listed
    assert listed[0].json == listed[1].json == listed[2].json
    assert [one["mac"] for one in listed[0].json] == [nic(1)["hwAddr"]]
    line = "172.16.0.0/16 dev eth1 scope link src 172.16.0.3"
    assert " ".join(pod.exec(container, "ip", "route")[1].split()) == line
    virtual = ("kata-ipvs", "ipvsadm", "--parameters")
    assert runtime(*virtual, "-A -t 172.16.0.3:80 -s rr -p 3000", container[:12]) == Result(0, "", "")
    assert "172.16.0.3:80" in runtime(*virtual, "-L", pod.id[:12]).stdout
    assert "AC100003:0050" in runtime("exec", "--guest", container, "--", "cat", "/proc/net/ip_vs").stdout
    inside = runtime("exec", container[:12], "--", "/bin/sh", "-c", "echo $$; ps")
    assert inside.status == 0
    assert "1 root" in inside.stdout
    removed = runtime("kata-network", "del-iface", container[:12], "-", stdin=json.dumps(nic(1)))
    assert removed.status == 0, removed


def test_containers_started_at_once(node: Kubelet) -> None:
    pod = node.run("a")

    def whole(name: str) -> str:
        container = pod.start(name, "/bin/sh", "-c", f"echo {name} >/tmp/it; exec sleep infinity")
        said = pod.exec(container, "/bin/sh", "-c", "until [ -s /tmp/it ]; do sleep 0.1; done; cat /tmp/it")
        node.cri("RemoveContainer", container_id=container)
        return said[1].strip()

    names = ["c", "d", "e", "f"]
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(whole, names)) == names
    assert node.pods() == {pod.id: "SANDBOX_READY"}
    assert not node.cri("ListContainers").containers


def test_a_privileged_container(node: Kubelet) -> None:
    """It may do in the guest what it likes; it sees no device of the host's."""
    pod = node.run("a", privileged=True)
    container = pod.start("c", *FOREVER, security={"privileged": True})
    mounted = pod.exec(container, "/bin/sh", "-c", "mkdir /m && mount -t tmpfs m /m && df /m | tail -1")
    assert (mounted[0], mounted[1].split()[-1]) == (0, "/m")
    assert pod.exec(container, "ls", "/sys/class/block")[1] == ""
    assert pod.exec(container, "/bin/sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward") == (0, "", "")


def test_a_container_that_takes_too_much_memory(node: Kubelet) -> None:
    pod = node.run("a")
    limit = {"memory_limit_in_bytes": 32 << 20}
    greedy = pod.start("c", "/bin/sh", "-c", "exec tail /dev/zero", resources=limit)
    status = pod.await_end(greedy)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    other = pod.start("d", *FOREVER)
    assert pod.exec(other, "/bin/echo", "fine") == (0, "fine\n", "")


def test_containerd_is_restarted(own_node: Kubelet) -> None:
    node, pod = own_node, own_node.run("a")
    container = pod.start("c", "/bin/sh", "-c", "echo before; exec sleep infinity")
    started = pod.status(container).started_at
    node.ctr.stop()
    node.ctr.start()
    node.cri.await_start()
    assert node.pods() == {pod.id: "SANDBOX_READY"}
    status = pod.status(container)
    assert (status.state, status.started_at) == (api.CONTAINER_RUNNING, started)
    assert pod.exec(container, "/bin/sh", "-c", "echo after >/proc/1/fd/1; echo here") == (0, "here\n", "")
    node.cri("StopContainer", container_id=container, timeout=30)
    assert pod.await_end(container).exit_code == 137
    assert [line[3] for line in pod.await_log("c", 2)] == ["before", "after"]


def test_a_container_ends_while_there_is_no_containerd(own_node: Kubelet, runtime: Runtime) -> None:
    """What it wrote then is in its log all the same: the plugin reads to the end, then deletes the task."""
    node, pod = own_node, own_node.run("a")
    script = "echo before; until [ -e /tmp/end ]; do sleep 0.1; done; echo after; exit 3"
    container = pod.start("c", "/bin/sh", "-c", script)
    (address,) = node.ctr.directory.glob(f"state/*/*/{pod.id}/address")
    socket = address.read_text().removeprefix("unix://")
    node.ctr.stop()
    assert runtime("exec", container, "--", "/bin/sh", "-c", "echo >/tmp/end").status == 0

    async def ended() -> int:
        async with await Client.connect(socket) as client:
            return int((await call(client, "Wait", id=container)).exit_status)

    assert asyncio.run(ended()) == 3
    node.ctr.start()
    node.cri.await_start()
    assert pod.await_end(container).exit_code == 3
    assert [line[3] for line in pod.await_log("c", 2)] == ["before", "after"]
    node.cri("RemoveContainer", container_id=container)


def test_what_a_container_leaves_behind_in_its_pod_holds_up_nobody(node: Kubelet) -> None:
    """In a process namespace that is shared it would live on, with the log open."""
    pod = node.run("a", pid=api.POD)
    script = "echo started; sleep 1000 & exit 3"
    container = pod.start("c", "/bin/sh", "-c", script, pid=api.POD)
    assert pod.await_end(container).exit_code == 3
    node.cri("RemoveContainer", container_id=container)
    other = pod.start("d", *FOREVER, pid=api.POD)
    assert "sleep 1000" not in pod.exec(other, "/bin/ps")[1]
    assert [line[3] for line in pod.log("c")] == ["started"]


def test_three_pods_at_once(node: Kubelet) -> None:
    def whole(name: str) -> str:
        pod = node.run(name)
        container = pod.start("c", "/bin/sh", "-c", f"echo {name}; exec sleep infinity")
        said = pod.exec(container, "/bin/echo", name)
        node.remove(pod.id)
        return said[1].strip()

    names = ["a", "b", "c"]
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(whole, names)) == names
    assert node.pods() == {}
