"""What a template's guest does before it is saved, so that its clones do it faster."""

from __future__ import annotations

import asyncio

from kata_shim import log
from kata_shim.agent import Agent
from kata_shim.agent_containers import Containers, shared_files
from kata_shim.config import Hypervisor
from kata_shim.contract import oci
from kata_shim.errors import ShimError

CLAIMS = 16  # after eight calls of a function CPython begins to make its code faster
CONTAINERS = 2  # more gain nothing: the time is the kernel's and the runtime's
PATIENCE = 60.0  # seconds for them; an emulated guest takes three
_SHARED = "/run/kata-containers/rehearsal"
_ROOT = "/run/kata-containers/rehearsal-root"
_MAKE_ROOT = f"mkdir -p {_ROOT}/bin && cp /bin/busybox {_ROOT}/bin && ln -s busybox {_ROOT}/bin/true"
# Which a guest that boots loads with its first disk; a kernel of another guest may have them built in.
_FOR_DISKS = "modprobe -a virtio_blk virtio_scsi sd_mod ext4 || :"


async def rehearse(agent: Agent, hypervisor: Hypervisor) -> None:
    """Have the agent do what a clone's will have to; raises ShimError, not for a guest without containers.

    Nothing of it is left in the guest but what kernel and interpreter have learned.
    """
    for _ in range(CLAIMS):
        await agent.claim("template")
    try:
        async with asyncio.timeout(PATIENCE):
            await _sh(agent, _MAKE_ROOT)
            for number in range(CONTAINERS):
                await _run(Containers(agent), f"rehearsal-{number}", hypervisor)
            await _sh(agent, f"rm -r {_ROOT}")
            if not hypervisor.disable_block_device_use:
                await _sh(agent, _FOR_DISKS)
    except ShimError as error:
        log.info("no container is rehearsed", reason=error.message)
    except TimeoutError:
        text = f"a template's guest has not run {CONTAINERS} containers in {PATIENCE:g} s"
        raise ShimError("deadline-exceeded", text) from None
    await agent.stand_still()


async def _sh(agent: Agent, script: str) -> None:
    """Run a script in the guest, which has the tools for it or is not this project's."""

    async def unheard(_stream: str, _data: bytes) -> None:
        return None

    if status := await agent.run(["sh", "-c", script], [], "", None, unheard):
        raise ShimError("internal", f"{script}: exit status {status}")


async def _run(guest: Containers, container_id: str, hypervisor: Hypervisor) -> None:
    """Run a container on files of the guest's, what the machine shares mounted for as long as it lives."""
    described = oci.read(oci.default_spec(_ROOT, ["/bin/true"], [], "", terminal=False))
    spec, _ = oci.adapt(described, _ROOT, lambda source, _: source, seccomp=True)
    storages = [shared_files(_SHARED, hypervisor)]
    await guest.create(container_id, spec, sandbox_pidns=False, storages=storages)
    try:
        await guest.start(container_id)
        await guest.wait(container_id, container_id)
        for stream in ("stdout", "stderr"):
            await guest.read(stream, container_id, container_id)
    except ShimError:
        await guest.remove(container_id)
        raise
    await guest.remove(container_id)
