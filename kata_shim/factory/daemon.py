"""The factory of one root of state: keeps a template, VMs and a zygote ready; its end, also by others."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from kata_shim import log
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.factory import endpoint
from kata_shim.factory.cache import Cache
from kata_shim.factory.home import Home
from kata_shim.factory.launch import Launch
from kata_shim.factory.template import Templates
from kata_shim.qemu.process import Process, read_start_time

STOP_TIMEOUT = 10.0  # seconds for a factory to end by itself
DESTROY_TIMEOUT = 30.0  # seconds for one to end, by force at last, or to tell who it is
RESTART_PAUSE = 1.0  # seconds before a zygote that has ended is started again


class Daemon:
    """A factory at work: `open`, `start`, and `close` at the end."""

    def __init__(self, root: Path, config: Config) -> None:
        self.cache = Cache(Home(root).vms, config, root / "accelerator.json")
        self._root = root
        self._config = config
        self._home = Home(root)
        self._endpoint = Path(config.factory.vm_cache_endpoint)
        self._zygote: Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> socket.socket:
        """Become the factory of the root, clear what a killed one left, and return the endpoint's socket.

        Raises ShimError `already-exists` where another is, and then changes nothing of it.
        """
        if not self._home.take():
            who = self._home.noted().get("pid")
            raise ShimError("already-exists", f"a factory of {self._root} runs already (pid {who})")
        try:
            await _clear_endpoint(self._home)
            self._home.note(os.getpid(), self._endpoint)  # before anything lasts: `destroy` must find us
            if killed := await self._home.sweep():
                log.warning("VMs of a factory that was killed are ended", count=killed)
            self._home.vms.mkdir(0o700, exist_ok=True)
            listener = await endpoint.bind(self._endpoint)
        except BaseException:
            await self._home.clear()
            raise
        return listener

    def start(self) -> None:
        """Begin to make what is to be kept ready."""
        self._tasks += [asyncio.create_task(self._keep_zygote()), asyncio.create_task(self._prepare())]

    async def close(self) -> None:
        """End all that is kept ready and leave nothing behind but the templates."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.cache.close()
        endpoint.remove_dead(self._endpoint)
        await self._home.clear()

    def status(self) -> dict[str, object]:
        """Return who this is, and how many VMs there are of each sort."""
        cache = self.cache
        found: dict[str, object] = {
            "running": True,
            "pid": os.getpid(),
            "root": str(self._root),
            "endpoint": str(self._endpoint),
            "zygote": self._zygote.pid if self._zygote else 0,
            "wanted": cache.wanted,
            "ready": cache.ready,
            "making": cache.making,
            "handed_over": cache.handed_over,
        }
        return {**found, "problems": [cache.trouble]} if cache.trouble else found

    async def _prepare(self) -> None:
        """Have the template made by one, not by whichever VM comes first; then fill the cache."""
        if self._config.factory.enable_template:
            try:
                await Launch(self._home.path, self._config, self._root / "accelerator.json").make_template(
                    _log
                )
            except (ShimError, OSError) as error:
                log.warning("no template can be made", error=str(error))
        self.cache.start()

    async def _keep_zygote(self) -> None:
        """Run a zygote, and another when it has ended, or could not be started, for as long as we live."""
        while True:
            try:
                status = await self._run_zygote()
                log.warning("the zygote has ended; starting another", status=status, seconds=RESTART_PAUSE)
            except Exception as error:
                log.warning("no zygote can be started; trying again", error=error, seconds=RESTART_PAUSE)
            await asyncio.sleep(RESTART_PAUSE)

    async def _run_zygote(self) -> int | None:
        """Run a zygote to its end and return its exit status; then nobody listens, so no caller waits."""
        with self._listen() as listener:
            self._zygote = zygote = _spawn_zygote(self._root, listener)
        self.cache.tell()
        try:
            return await asyncio.shield(zygote.exited)
        finally:
            await zygote.kill()
            self._zygote = None
            self._home.zygote.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        self._home.zygote.unlink(missing_ok=True)
        directory = os.open(self._home.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # A socket's path is at most 107 bytes long; the root may lie deep.
            return endpoint.listen(Path(f"/proc/self/fd/{directory}/{self._home.zygote.name}"))
        finally:
            os.close(directory)


def _spawn_zygote(root: Path, listener: socket.socket) -> Process:
    command = [
        sys.executable,
        "-I",
        "-m",
        "kata_shim.shim",
        "zygote",
        "--root",
        str(root),
        "--listen-fd",
        "3",
    ]
    pid = os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, listener.fileno(), 3),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGPIPE),
    )
    try:
        return Process(pid, read_start_time(pid), os.pidfd_open(pid))
    except OSError:  # no descriptor is left; it must not live on unwatched
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


async def _log(step: str) -> None:
    log.info(step)


async def _clear_endpoint(home: Home) -> None:
    """Remove the socket of the factory that had the directory before us."""
    if path := home.noted().get("endpoint"):
        endpoint.remove_dead(Path(str(path)))


async def destroy(root: Path) -> None:
    """End the factory of a root, or clear what a killed one left; the templates stay. Raises ShimError."""
    home = Home(root)
    if not home.path.exists():
        return
    try:
        async with asyncio.timeout(DESTROY_TIMEOUT):
            while not home.take():
                await _end(home.noted())
    except TimeoutError:
        who = home.noted().get("pid", "unknown")
        why = f"its owner (pid {who}) does not end within {DESTROY_TIMEOUT:g} s; end it by hand"
        raise ShimError("deadline-exceeded", f"{home.path}/lock: {why}") from None
    await _clear_endpoint(home)
    await home.clear()


async def _end(noted: dict[str, object]) -> None:
    """End the factory that noted this, by force if it does not by itself; one that is gone is fine."""
    try:
        process = Process.attach(int(str(noted["pid"])), int(str(noted["start_time"])))
    except (ShimError, KeyError, ValueError):
        await asyncio.sleep(0.05)  # it is just starting, or ending
        return
    try:
        for number in (signal.SIGTERM, signal.SIGCONT):
            process.signal(number)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT):
                await asyncio.shield(process.exited)
        await process.kill()
    finally:
        process.close()


async def status(root: Path, templates: Templates) -> dict[str, object]:
    """Return what the factory of a root tells of itself, if one runs, and which templates there are."""
    home = Home(root)
    found: dict[str, object] = {"running": home.is_taken()}
    try:
        if found["running"]:
            found |= {"pid": home.noted()["pid"]}
            async with endpoint.ask(Path(str(home.noted()["endpoint"])), "factory.status") as answer:
                found |= await answer()
        elif home.path.exists():
            found["problems"] = [
                "the factory was killed: `factory destroy` clears what it left, as does `init`"
            ]
    except KeyError:
        found["problems"] = ["the factory is just starting"]
    except (ShimError, OSError) as error:
        found["problems"] = [error.message if isinstance(error, ShimError) else str(error)]
    return {**found, "templates": templates.listed()}
