"""kata-runtime factory, and the methods of a factory's endpoint (JSON lines, docs/protocol.md)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import orjson

from kata_shim import log
from kata_shim.config import Config, find_config, load
from kata_shim.errors import ShimError, invalid
from kata_shim.faces.jsonl import Call, Handler, Server
from kata_shim.factory import daemon
from kata_shim.factory.cache import OFFER_TIMEOUT
from kata_shim.factory.daemon import Daemon
from kata_shim.factory.template import Templates
from kata_shim.qemu.process import raise_file_limit
from kata_shim.sandbox import preconditions


def init(root: Path, config: str, _form: str) -> int:
    """Be the factory of a root until SIGTERM or SIGINT."""
    settings, warnings = load(find_config(config or None))
    for warning in warnings:
        print(warning, file=sys.stderr)
    preconditions.check(settings)
    os.chdir("/")
    raise_file_limit()
    log.setup("factory", debug=settings.runtime.enable_debug)
    asyncio.run(_produce(root, settings))
    return 0


def status(root: Path, config: str, form: str) -> int:
    """Print what the factory of a root has ready, and the templates."""
    found = asyncio.run(daemon.status(root, _templates(config)))
    print(orjson.dumps(found).decode() if form == "json" else _table(found))
    return 0


def destroy(root: Path, config: str, _form: str) -> int:
    """End the factory of a root, and remove the templates."""
    asyncio.run(daemon.destroy(root))
    asyncio.run(_templates(config).clear())
    return 0


COMMANDS: dict[str, Callable[[Path, str, str], int]] = {"init": init, "status": status, "destroy": destroy}


async def _produce(root: Path, settings: Config) -> None:
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
    factory = Daemon(root, settings)
    listener = await factory.open()
    server = Server(methods(factory))
    try:
        await server.listen(listener)
        factory.start()
        log.info("the factory serves", endpoint=settings.factory.vm_cache_endpoint)
        await told_to_stop.wait()
        log.info("the factory ends")
    finally:
        await server.close()
        await factory.close()


def _templates(config: str) -> Templates:
    settings, _ = load(find_config(config or None))
    return Templates(Path(settings.factory.template_path))


def _table(found: dict[str, object]) -> str:
    """Return a line for every value, a list's after its name."""
    lines = []
    for name, value in found.items():
        if isinstance(value, list):
            lines += [f"{name:12}: {_words(each)}" for each in value]
        else:
            lines.append(f"{name:12}: {_words(value)}")
    return "\n".join(lines)


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):  # a template
        return f"{value['fingerprint']} {value['bytes'] >> 20} MiB, {value['seconds']} s old"
    return str(value)


def methods(daemon: Daemon) -> dict[str, Handler]:
    """Return every method of the endpoint, bound to `daemon`."""
    commands = _Commands(daemon)
    return {
        "factory.take": commands.take,
        "factory.status": commands.status,
        "factory.watch": commands.watch,
    }


class _Commands:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def take(self, call: Call) -> object:
        """Offer a VM; the taker moves its directory, and then ends the request or the connection."""
        params = call.params
        if not isinstance(params, dict) or not isinstance(params.get("kind"), str):
            raise invalid("kind: not a string")
        async with self._daemon.cache.offer(params["kind"], params.get("netns")) as vm:
            await call.progress(vm.to_json())
            await asyncio.sleep(OFFER_TIMEOUT)
            raise ShimError("deadline-exceeded", f"the VM was not taken within {OFFER_TIMEOUT:g} s")

    async def status(self, call: Call) -> object:
        return self._daemon.status()

    async def watch(self, call: Call) -> object:
        """Tell the status whenever it changes, the present one first."""
        while True:
            changed = self._daemon.cache.changed
            await call.progress(self._daemon.status())
            await asyncio.wait((changed,))
