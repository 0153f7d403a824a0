"""The guest's file tree while it is put together, and the archive that the kernel unpacks."""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass
class Tree:
    """Paths without a leading slash -> entries. Everything belongs to root and has no time of change."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def file(self, path: str, data: bytes, permissions: int = 0o644) -> None:
        self._put(path, Entry(stat.S_IFREG | permissions, data))

    def link(self, path: str, target: str) -> None:
        self._put(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def directory(self, path: str, permissions: int = 0o755) -> None:
        self._put(path, Entry(stat.S_IFDIR | permissions))

    def character_device(self, path: str, major: int, minor: int, permissions: int) -> None:
        self._put(path, Entry(stat.S_IFCHR | permissions, device=(major, minor)))

    def _put(self, path: str, entry: Entry) -> None:
        for parent in reversed(Path(path).parents[:-1]):
            self.entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        self.entries[path] = entry

    def copy(self, top: Path) -> None:
        """Add the regular files below a directory of this machine, as if it were /."""
        for path in sorted(top.rglob("*")):
            if path.is_file():
                self.file(str(path.relative_to(top)), path.read_bytes())

    def cpio(self) -> bytes:
        """The tree as a "newc" archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).

        Several of them one after the other are one initramfs; the same tree gives the same bytes.
        """
        members = [*sorted(self.entries.items()), ("TRAILER!!!", Entry(0))]
        return b"".join(
            part for inode, (path, entry) in enumerate(members) for part in _member(inode, path, entry)
        )


def _member(inode: int, path: str, entry: Entry) -> Iterator[bytes]:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    owner, changed, device = (0, 0), 0, (0, 0)
    fields = (
        inode,
        entry.mode,
        *owner,
        links,
        changed,
        len(entry.data),
        *device,
        *entry.device,
        len(name),
        0,
    )
    yield b"070701" + b"".join(b"%08X" % value for value in fields) + name
    yield bytes(-(110 + len(name)) % 4)
    yield entry.data
    yield bytes(-len(entry.data) % 4)


def needed_libraries(elf: bytes) -> list[str]:
    """The DT_NEEDED names of a 64-bit ELF file (System V ABI, "Dynamic Section"); none for anything else."""
    if elf[:5] != b"\x7fELF\x02":
        return []
    table, count = struct.unpack_from("<Q", elf, 0x20)[0], struct.unpack_from("<H", elf, 0x38)[0]
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 56 * n) for n in range(count)]
    dynamic = [(offset, size) for kind, _, offset, _, _, size in headers if kind == 2]
    if not dynamic:
        return []
    start, size = dynamic[0]
    tags = list(struct.iter_unpack("<QQ", elf[start : start + size]))
    strings = next(value for tag, value in tags if tag == 5)
    base = next(
        offset - address + strings
        for kind, _, offset, address, _, size in headers
        if kind == 1 and address <= strings < address + size
    )
    names = (base + value for tag, value in tags if tag == 1)
    return [elf[name : elf.index(b"\0", name)].decode() for name in names]
