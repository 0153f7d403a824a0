"""record.json: what the sandbox owns, on disk before and after each step; a killed shim loses nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from kata_shim.contract.interface import Interface, from_record, to_record
from kata_shim.errors import ShimError
from kata_shim.netconf.link import Link
from kata_shim.qemu.topology import Slot


@dataclass(slots=True)
class Nic:
    """One NIC that add-iface added.

    `phase`: `adding` (not whole yet) and `undoing` (the guest keeps what an add left): re-attach takes it
    back; `present`; `updating`: re-attach sets it back to what stands here; `removing`: it is finished.
    `tap`: the host's tap as it was before the add, which taking the add back restores; None: there was none.
    """

    interface: Interface
    slot: Slot
    phase: str
    tap: Link | None = None

    def to_json(self) -> dict[str, object]:
        """Return the NIC as record.json holds it."""
        return {
            "interface": to_record(self.interface),
            "path": self.slot.path,
            "phase": self.phase,
            "tap": self.tap and asdict(self.tap),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], slot_of: Callable[[str], Slot]) -> Nic:
        """Return the NIC again; raises KeyError, TypeError, ValueError or ShimError for what is none."""
        nic = cls(from_record(value["interface"]), slot_of(value["path"]), value["phase"])
        if tap := value.get("tap"):  # a record of an earlier version has none
            nic.tap = Link(**tap)
        return nic


@dataclass(slots=True)
class Record:
    """Everything a new shim must know to take the sandbox over."""

    id: str
    config: str  # the configuration.toml it was started with
    created: str  # RFC 3339, UTC
    uuid: str  # QEMU's -uuid; the guest's vsock context id is made from it
    state: str = "creating"
    cause: str = ""
    pid: int = 0
    start_time: int = 0  # of that pid, clock ticks after boot: proof against pid reuse
    accelerator: str = ""
    source: str = ""  # how it was started: "boot", "template" or "cache"
    has_containers: bool = False  # or had some, or is to have: no later shim can take those over
    nics: list[Nic] = field(default_factory=list)
    unread: list[Any] = field(default_factory=list)  # NICs as a record has them, until `read_nics`

    def to_json(self) -> dict[str, object]:
        """Return the record as it is written."""
        values: dict[str, object] = {name: getattr(self, name) for name in _SCALARS}
        return {**values, "nics": [*self.unread, *(nic.to_json() for nic in self.nics)]}

    def read_nics(self, slot_of: Callable[[str], Slot]) -> None:
        """Read the NICs; `slot_of` turns a PCI path back into its slot.

        Raises ShimError `data-loss` for what this version does not take; all then stay unread.
        """
        try:
            self.nics = [Nic.from_json(nic, slot_of) for nic in self.unread]
        except (KeyError, TypeError, ValueError, ShimError) as error:
            raise ShimError("data-loss", f"a NIC on record is not of this version: {error}") from None
        self.unread = []


_EMPTY = Record("", "", "", "")
_SCALARS = (
    *("id", "config", "created", "uuid", "state", "cause", "pid", "start_time", "accelerator", "source"),
    "has_containers",
)
_SINCE = {"source": "boot", "has_containers": False}  # what records of an earlier version have not


def load(path: Path) -> Record:
    """Return what record.json says, its NICs unread: which QEMU is the sandbox's is to be known in any case.

    Raises ShimError `data-loss` for a file that is not there, or that this program did not write.
    """
    try:
        value: dict[str, Any] = {**_SINCE, **orjson.loads(path.read_bytes())}
        record = Record(**{name: _same_kind(value[name], getattr(_EMPTY, name)) for name in _SCALARS})
        record.unread = _same_kind(value["nics"], [])
    except OSError as error:
        raise ShimError("data-loss", f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ShimError("data-loss", f"{path}: not a record of this version: {error}") from None
    return record


def _same_kind(value: Any, example: object) -> Any:
    if type(value) is not type(example):
        raise TypeError(f"{value!r} is not {type(example).__name__}")
    return value


class RecordFile:
    """Writes the record atomically; saves that come while one is written are covered by one more write."""

    def __init__(self, path: Path, render: Callable[[], dict[str, object]]) -> None:
        self._path = path
        self._render = render
        self._lock = asyncio.Lock()
        self._wanted = 0
        self._written = 0
        self._closed = False

    async def close(self) -> None:
        """Write no more, and wait for what is being written: the directory is about to go."""
        self._closed = True
        async with self._lock:
            pass

    async def save(self) -> None:
        """Return once a version at least as new as this call is on disk.

        Raises ShimError `resource-exhausted` in the kernel's words when it cannot be written; the version
        before then still stands whole. A cancelled caller leaves no half-written file.
        """
        self._wanted += 1
        mine = self._wanted
        async with self._lock:
            if self._written >= mine or self._closed:
                return
            covered = self._wanted
            write = asyncio.ensure_future(
                asyncio.to_thread(write_whole, self._path, orjson.dumps(self._render()))
            )
            try:
                await asyncio.shield(write)
            except asyncio.CancelledError:
                await asyncio.wait((write,))
                raise
            self._written = covered


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file whole or not at all; raises ShimError `resource-exhausted` in the kernel's words."""
    new = path.with_suffix(".new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    except OSError as error:
        with suppress(FileNotFoundError):
            os.unlink(new)
        raise ShimError("resource-exhausted", f"{path}: cannot be written: {error.strerror}") from None
