"""The agent's process: PID 1 of the guest, or under it. `kata-agent [--listen-fd N]`.

The channel is the listening socket N, or vsock where the kernel command line says `agent.channel=vsock`, or
else the virtio-serial port agent.channel.0.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack

from kata_shim import log
from kata_shim.guest import channel, system
from kata_shim.guest.children import Children
from kata_shim.guest.services import Agent
from kata_shim.netconf import link
from kata_shim.netconf.netlink import Netlink

_RESTART_DELAY = 1.0  # seconds, so that a lasting fault does not keep the guest's processor busy
_ANSWER_DELAY = 0.05  # seconds for DestroySandbox's answer to leave
_PROMOTE_SECONDARIES = "/proc/sys/net/ipv4/conf/all/promote_secondaries"


async def serve(listener: socket.socket | None = None) -> None:
    """Serve the agent's services, on a stream socket if one is given, until the sandbox is destroyed."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        loop.call_later(_ANSWER_DELAY, stopped.set)

    async with AsyncExitStack() as closing:
        netlink = Netlink()
        closing.callback(netlink.close)
        monitor = link.Monitor()
        closing.callback(monitor.close)
        children = Children()
        closing.callback(children.close)
        _promote_secondaries()
        loopback = await link.find(netlink, "lo")
        assert loopback is not None
        await link.ensure(netlink, loopback)
        agent = Agent(netlink, monitor, children)
        if listener is None and "agent.channel=vsock" in _kernel_command_line():
            listener = channel.vsock_listener()
        if listener is None:
            port = channel.VirtioPort(await channel.open_port(), lambda still: agent.server(stop, still))
            closing.callback(port.close)
        else:
            server = await channel.listen(listener, lambda still: agent.server(stop, still))
            closing.callback(server.close)
        # What was imported stays: the collector need not walk it again and again.
        gc.freeze()
        await stopped.wait()


def _promote_secondaries() -> None:
    """Let a link keep its other IPv4 addresses, and its routes, when its first one is taken away."""
    with open(_PROMOTE_SECONDARIES, "w") as setting:
        setting.write("1")


def _kernel_command_line() -> list[str]:
    with open("/proc/cmdline") as line:
        return line.read().split()


def main() -> int:
    """Run the agent. As PID 1 it never returns: when PID 1 ends the kernel panics."""
    log.setup("guest")
    if os.getpid() != 1:
        system.inherit_orphans()
        match sys.argv[1:]:
            case []:
                asyncio.run(serve())
            case ["--listen-fd", fd] if fd.isdecimal():
                asyncio.run(serve(socket.socket(fileno=int(fd))))
            case _:
                print("usage: kata-agent [--listen-fd N]", file=sys.stderr)
                return 2
        return 0
    system.expedite_rcu()
    system.take_precedence()
    system.keep_memory()
    # Ctrl-Alt-Del reaches PID 1 as SIGINT.
    signal.signal(signal.SIGINT, lambda *_: None)
    while True:
        try:
            asyncio.run(serve())
            system.power_off()
        except (Exception, KeyboardInterrupt, SystemExit):
            log.exception("the agent failed and starts again")
        time.sleep(_RESTART_DELAY)


if __name__ == "__main__":
    sys.exit(main())
