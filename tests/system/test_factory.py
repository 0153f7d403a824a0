"""The factory: VMs made before anybody asks, each handed out once, and nobody's VM at no moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kata_shim.config import load
from kata_shim.factory.take import kind, network_namespace
from kata_shim.qemu.process import read_start_time
from kata_shim.vm.machine import Machine
from tests.factory import EMULATED, Factory, configure, delete, run, serving, vms
from tests.started import PATIENCE, kill, shims, taken, watched
from tests.support import Guest, Result, Runtime
from tests.system.network import agree, nic
from tests.wire import Wire
from tests.zygote import parent

ROUNDS = 20
SEED = 3
CLOCK = 0.05  # seconds that a guest's clock may be off
OWN = """
import os, time
print(time.time(), os.urandom(16).hex(), open("/proc/sys/kernel/random/uuid").read())
"""


@pytest.fixture(scope="module")
def directory(root: Path) -> Iterator[Path]:
    """What these tests' factories have for their own, on the run's tmpfs."""
    path = root / "factories"
    path.mkdir(0o700)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def own(directory: Path) -> Runtime:
    """The CLI with a cache of one VM, on a root of its own."""
    return Runtime(directory / "root", configure(directory / "one.toml", directory))


@pytest.fixture(autouse=True)
def no_sandboxes(own: Runtime) -> Iterator[None]:
    """A test that fails with sandboxes fails alone."""
    yield
    delete(own, *"abc")


@pytest.fixture
def factory(own: Runtime, directory: Path) -> Iterator[Factory]:
    """A factory whose one VM is ready."""
    with serving(own, directory / "run/cache.sock") as factory:
        factory.until_full()
        yield factory


def test_a_sandbox_from_the_cache(factory: Factory, own: Runtime) -> None:
    """It has the very VM that was ready, is as any other, and lives on without the factory."""
    (ready,) = factory.vms()
    assert run(own, "a") == "cache"
    guest = Guest(own, "a")
    assert guest.record()["pid"] == ready
    words = Path(f"/proc/{ready}/cmdline").read_text().split("\0")
    assert words[words.index("-name") + 1].partition(",")[0] == guest.record()["uuid"]
    factory.until_full(1)
    assert ready not in factory.vms()
    assert guest.run("hostname").stdout == "a\n"
    files = {path.name for path in (own.root / "sandboxes/a").iterdir()}
    assert "taken" not in files
    assert {"agent.sock", "console.sock", "qmp.sock", "qemu.log"} <= files
    assert factory.end().status == 0
    assert guest.network("add-iface", nic(1)).status == 0
    kill(shims(own.root, "a")[0])
    agree(guest)
    assert own("state", "a").json["source"] == "cache"
    delete(own, "a")


def test_each_sandbox_has_its_own_random_numbers_and_the_hosts_time(factory: Factory, own: Runtime) -> None:
    """Though all are clones that stood still with their template's."""
    seen = []
    for count, name in enumerate("abc"):
        factory.until_full(count)
        assert run(own, name) == "cache"
        before = time.time()
        now, *words = own("exec", name, "--", "python3", "-c", OWN).stdout.split()
        assert before - CLOCK < float(now) < time.time() + CLOCK
        seen += words
    assert len(set(seen)) == 6
    delete(own, *"abc")


def test_status(factory: Factory, own: Runtime, directory: Path) -> None:
    status = own("factory", "status", "--json").json
    (template,) = status.pop("templates")
    (fingerprint,) = (path.parent.name for path in (directory / "templates").glob("*/template.json"))
    assert template.pop("bytes") > 1 << 20
    assert 0 <= template.pop("seconds") < time.monotonic()
    assert template == {"fingerprint": fingerprint}
    assert status == {
        "running": True,
        "pid": factory.pid,
        "root": str(own.root),
        "endpoint": str(factory.endpoint),
        "zygote": status["zygote"],
        "wanted": 1,
        "ready": 1,
        "making": 0,
        "handed_over": 0,
    }
    lines = own("factory", "status").stdout.splitlines()
    assert [line.partition(":")[0].strip() for line in lines] == [*status, "templates"]
    assert lines[0] == "running     : yes"
    assert lines[-1].startswith(f"templates   : {fingerprint} ")


def test_status_without_a_factory(own: Runtime, factory: Factory) -> None:
    factory.end()
    status = own("factory", "status", "--json").json
    assert [*status] == ["running", "templates"]
    assert not status["running"]
    assert own("factory", "status").stdout.splitlines()[0] == "running     : no"


def test_a_second_factory_is_refused(factory: Factory, own: Runtime, directory: Path, tmp_path: Path) -> None:
    """Of the same root, and of another with the same endpoint; the first does not notice."""
    ready = factory.vms()
    message = f"a factory of {own.root} runs already (pid {factory.pid})\n"
    assert own("factory", "init") == Result(1, "", message)
    other = replace(own, root=directory / "other")
    who = f"{factory.endpoint}: the factory of {own.root} (pid {factory.pid}) serves there"
    message = f"vm_cache_endpoint: {who}; destroy it, or set another path\n"
    assert other("factory", "init") == Result(1, "", message)
    assert not (other.root / "factory").exists()
    assert factory.vms() == ready
    assert own("factory", "status", "--json").json["ready"] == 1


def test_what_is_no_socket_at_the_endpoint_is_not_touched(own: Runtime, directory: Path) -> None:
    endpoint = directory / "run/cache.sock"
    endpoint.parent.mkdir(exist_ok=True)
    endpoint.write_text("precious")
    message = f"vm_cache_endpoint: {endpoint} exists and is no socket; remove it, or set another\n"
    assert own("factory", "init") == Result(1, "", message)
    assert endpoint.read_text() == "precious"
    assert not (own.root / "factory").exists()
    endpoint.unlink()


def test_somebody_elses_socket_at_the_endpoint_is_not_touched(own: Runtime, directory: Path) -> None:
    """One that listens and does not answer; a sandbox's start does not wait for it for long."""
    endpoint = directory / "run/cache.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(endpoint))
        other.listen()
        message = (
            f"vm_cache_endpoint: {endpoint}: another program serves there; destroy it, or set another path\n"
        )
        assert own("factory", "init") == Result(1, "", message)
        assert run(own, "a") == "template"
        delete(own, "a")
    assert endpoint.is_socket()
    with serving(own, endpoint) as factory:  # now nobody listens any more
        assert factory.until_full()["ready"] == 1


def test_a_wrong_configuration(own: Runtime, tmp_path: Path) -> None:
    config = configure(tmp_path / "wrong.toml", tmp_path, -1)
    where = f"{config}:{line_of(config, 'vm_cache_number')}"
    message = f"{where}: [factory] vm_cache_number: -1 is not within 0..1000\n"
    for word in ("init", "status", "destroy"):
        assert own("factory", word, "--config", str(config)) == Result(1, "", message)
    config = configure(tmp_path / "missing.toml", tmp_path, kernel="/no/kernel")
    answer = own("factory", "init", "--config", str(config))
    where = f"{config}:{line_of(config, 'kernel')}"
    assert (answer.status, answer.stdout) == (1, "")
    assert answer.stderr.startswith(f"{where}: [hypervisor.qemu] kernel: /no/kernel (the guest's kernel)")


def line_of(config: Path, field: str) -> int:
    """The number of the line that sets a field."""
    names = [line.partition(" ")[0] for line in config.read_text().splitlines()]
    return names.index(field) + 1


def test_a_sandbox_of_another_configuration_is_not_given_a_vm(
    factory: Factory, own: Runtime, directory: Path, tmp_path: Path
) -> None:
    """One whose memory is to be shared with back ends; it is cloned, from the same template."""
    other = replace(own, config=configure(tmp_path / "other.toml", directory, shared_memory=True))
    assert run(other, "a") == "template"
    delete(own, "a")
    assert factory.until_full()["handed_over"] == 0


def test_a_sandbox_of_another_network_namespace_is_not_given_a_vm(factory: Factory, own: Runtime) -> None:
    """Its taps are to be there: it is a clone, of a shim that the zygote has forked and that went there."""
    zygote = factory.until(lambda status: status["zygote"] > 0)["zygote"]
    command = ["unshare", "--net", *own.command("run", "--detach", "a")]
    done = subprocess.run(command, env=own.environment, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, EMULATED)
    state = own("state", "a").json
    assert state["source"] == "template"
    assert parent(state["shimPid"]) == zygote
    spaces = [os.readlink(f"/proc/{pid}/ns/net") for pid in (factory.pid, state["shimPid"], state["pid"])]
    assert spaces[0] != spaces[1] == spaces[2]
    assert Guest(own, "a").network("add-iface", nic(1)).status == 0
    assert nic(1)["device"] not in os.listdir("/sys/class/net")
    delete(own, "a")
    assert factory.until_full()["handed_over"] == 0


@asynccontextmanager
async def offered(factory: Factory) -> AsyncIterator[Path]:
    """Be offered a VM, as a shim is; what is yielded is to be moved away."""
    settings, _ = load(factory.runtime.config)
    machine = Machine(factory.runtime.root, settings, factory.runtime.root / "accelerator.json")
    await machine.choose_accelerator()
    params = {"kind": kind(settings, machine.describe()), "netns": network_namespace()}
    await machine.close()
    async with await Wire.connect(factory.endpoint) as wire:
        wire.request("factory.take", params)
        yield Path((await wire.receive())["progress"]["directory"])


async def test_an_offer_that_is_not_taken(factory: Factory) -> None:
    """The taker gives up, or dies, before it has moved the VM: somebody else may have it."""
    ready = factory.vms()
    for _ in range(2):
        async with offered(factory):
            assert factory.until(lambda status: True)["ready"] == 0
        factory.until_full()
    assert factory.vms() == ready


async def test_requests_that_no_shim_makes(factory: Factory) -> None:
    wanted = {"kind": "another", "netns": network_namespace()}
    refusals = [
        (wanted, "failed-precondition", "the factory's VMs are of another configuration"),
        ({**wanted, "netns": [0, 0]}, "failed-precondition", "the factory is in another network namespace"),
        ({**wanted, "netns": None}, "failed-precondition", "the factory is in another network namespace"),
        ({**wanted, "kind": 1}, "invalid-argument", "kind: not a string"),
        ([], "invalid-argument", "kind: not a string"),
        (None, "invalid-argument", "kind: not a string"),
    ]
    async with await Wire.connect(factory.endpoint) as wire:
        for params, code, message in refusals:
            error = (await wire.call("factory.take", params))["error"]
            assert error == {"code": code, "message": message}
    assert factory.until_full()["handed_over"] == 0


@pytest.mark.parametrize("late", [False, True])
async def test_a_taker_that_dies_after_it_has_moved_the_vm(
    factory: Factory, own: Runtime, late: bool
) -> None:
    """Nobody knows of it but the sandbox's directory: the factory leaves it alone, and `delete` ends it.

    One who was offered it and is `late`, when it might be another's, has it all the same, and it alone.
    """
    (ready,) = factory.vms()
    sandbox = own.root / "sandboxes/a"
    sandbox.mkdir(0o700, parents=True)
    async with offered(factory) as vm:
        if not late:
            vm.rename(sandbox / "taken")
    if late:
        factory.until_full()
        vm.rename(sandbox / "taken")
        assert run(own, "b") == "template"
        delete(own, "b")
    factory.until_full(1)
    with watched(ready) as ended:
        assert factory.end().status == 0
        assert not ended()
        delete(own, "a")
        assert ended()


def test_a_vm_that_dies_is_replaced(factory: Factory) -> None:
    (dead,) = factory.vms()
    kill(dead)
    factory.until(lambda status: status["ready"] == 0)
    factory.until_full()
    (other,) = factory.vms()
    assert other != dead


def test_a_zygote_that_dies_is_replaced(factory: Factory) -> None:
    zygote = factory.until(lambda status: status["zygote"] > 0)["zygote"]
    kill(zygote)
    factory.until(lambda status: status["zygote"] not in (0, zygote))


def test_a_factory_that_stands_still_holds_up_nobody(factory: Factory, own: Runtime) -> None:
    """Neither a start nor its own end."""
    ready = factory.vms()
    os.kill(factory.pid, signal.SIGSTOP)
    assert run(own, "a") == "template"
    status = own("factory", "status", "--json").json
    assert status["running"]
    assert "does not answer within 3 s" in status["problems"][0]
    assert own("factory", "destroy") == Result(0, "", "")
    assert factory.process.wait(PATIENCE) == 0
    assert [read_start_time(pid) for pid in ready] == [0]
    assert own("state", "a").json["status"] == "running"
    delete(own, "a")


def test_destroy_leaves_nothing(own: Runtime, directory: Path) -> None:
    """Of a factory that runs, of one that was killed, and of none; the sandbox it gave a VM to stays."""
    endpoint = directory / "run/cache.sock"
    with serving(own, endpoint) as factory:
        factory.until_full()
        assert run(own, "a") == "cache"
        factory.until_full(1)
        assert own("factory", "destroy") == Result(0, "", "")
        assert factory.process.wait(PATIENCE) == 0
    for _ in range(2):
        assert not (own.root / "factory").exists()
        assert not os.path.lexists(endpoint)
        assert not os.listdir(directory / "templates")
        assert vms(own) == []
        assert own("factory", "destroy") == Result(0, "", "")
    with serving(own, endpoint) as factory:
        factory.until_full()
        (ready,) = factory.vms()
        kill(factory.pid)
        assert vms(own) == [ready]
        assert "was killed" in own("factory", "status", "--json").json["problems"][0]
        assert own("factory", "destroy") == Result(0, "", "")
    assert read_start_time(ready) == 0
    assert not (own.root / "factory").exists()
    assert not os.path.lexists(endpoint)
    assert own("state", "a").json["status"] == "running"
    delete(own, "a")


def test_a_factory_killed_while_it_hands_over(own: Runtime, directory: Path) -> None:
    """The sandbox starts, from the cache or without, and the next factory clears what the dead one left."""
    chance = random.Random(SEED)
    sources: Counter[str] = Counter()
    longest = PATIENCE  # of the first round: the factory dies after the start
    for number in range(ROUNDS):
        with serving(own, directory / "run/cache.sock") as factory:
            factory.until_full()
            began = time.monotonic()
            start = own.start("run", "--detach", "a")
            with watched(start.pid) as ended:
                ended(chance.uniform(0, longest) if number else longest)
            kill(factory.pid)
            assert start.communicate(timeout=PATIENCE) == (b"", EMULATED.encode())
            assert start.returncode == 0
            longest = longest if number else taken(began)
        sources[own("state", "a").json["source"]] += 1
        assert len(vms(own)) <= 1, "a VM is two parties'"
        delete(own, "a")
    assert sources["cache"] > 0
    assert own("factory", "destroy") == Result(0, "", "")
    assert vms(own) == []


def test_a_shim_killed_while_it_takes(factory: Factory, own: Runtime) -> None:
    """What it had taken goes with its sandbox, what it had not stays ready."""
    chance = random.Random(SEED)
    began = time.monotonic()
    assert run(own, "a") == "cache"
    longest = taken(began)
    delete(own, "a")
    for _ in range(ROUNDS):
        factory.until_full()
        start = own.start("run", "--detach", "a")
        with watched(start.pid) as ended:
            ended(chance.uniform(0, longest))
        for pid in shims(own.root, "a"):
            with suppress(ProcessLookupError):  # it has just ended by itself
                kill(pid)
        start.communicate(timeout=PATIENCE)
        delete(own, "a")
    status = factory.until_full()
    assert len(factory.vms()) == 1
    assert status["handed_over"] > 1


def test_a_vm_of_a_kernel_that_has_changed_since_is_not_given_out(directory: Path, tmp_path: Path) -> None:
    """Without templates each VM is booted; `touch` is change enough."""
    kernel = tmp_path / "vmlinux"
    shutil.copy("/var/lib/kata-shim/guest/vmlinux", kernel)
    config = configure(tmp_path / "c.toml", directory, clone=False, kernel=str(kernel))
    own = Runtime(directory / "root", config)
    with serving(own, directory / "run/cache.sock") as factory:
        factory.until_full()
        (outdated,) = factory.vms()
        os.utime(kernel)
        assert run(own, "a") == "boot"
        factory.until_full()
        assert read_start_time(outdated) == 0
        assert run(own, "b") == "cache"
        delete(own, "a", "b")
