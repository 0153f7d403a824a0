"""All of the guest that is Debian's: kernel, modules, Python, network tools, and their libraries."""

import fnmatch
import lzma
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from guest import debian
from guest.debian import MERGED, BuildError
from guest.tree import Tree, needed_libraries

PACKAGES = [
    *("linux-image-amd64", "busybox", "conntrack", "crun", "iproute2", "ipvsadm", "python3.11-minimal"),
    *(
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
        "libbpf1",
        "libbsd0",
        "libc6",
        "libcap2",
        "libelf1",
        "libexpat1",
    ),
    *(
        "libffi8",
        "libgcc-s1",
        "libmd0",
        "libmnl0",
        "libnetfilter-conntrack3",
        "libnfnetlink0",
        "libnl-3-200",
        "libnl-genl-3-200",
    ),
    *(
        "libgcrypt20",
        "libgpg-error0",
        "liblz4-1",
        "liblzma5",
        "libseccomp2",
        "libsystemd0",
        "libyajl2",
        "libzstd1",
    ),
    *("libpcre2-8-0", "libpopt0", "libselinux1", "libstdc++6", "libxtables12", "runc", "zlib1g"),
]
PROGRAMS = [
    *("usr/bin/busybox", "usr/bin/python3.11", "usr/bin/ip", "usr/sbin/bridge", "usr/sbin/tc"),
    *("usr/sbin/ipvsadm", "usr/sbin/conntrack"),
]
RUNTIMES = {"crun": "usr/bin/crun", "runc": "usr/sbin/runc"}  # one of them is in a guest
STDLIB = "usr/lib/python3.11/"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
FOR_PROTOBUF = "libstdc++.so.6"  # without it protobuf falls back, silently, to Python several times as slow
LOADER = "ld-linux-x86-64.so.2"
DIRECTORIES = ("dev", "mnt", "proc", "root", "run", "sys", "var/log")
FILES = {
    "etc/group": "root:x:0:\ntty:x:5:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/modprobe.d/guest.conf": "options dummy numdummies=0\noptions scsi_mod scan=manual\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
}


class Unpacked:
    """The files of the packages, in memory: path -> (permissions, content)."""

    def __init__(self, debs: Iterable[Path]) -> None:
        self.files: dict[str, tuple[int, bytes]] = {}
        self.links: dict[str, str] = {}
        for deb in debs:
            for path, member, data in debian.members(deb):
                if member.issym():
                    self.links[path] = member.linkname
                else:
                    self.files[path] = (member.mode & 0o777, data)

    def data(self, path: str) -> bytes:
        """A file's content; a library's symbolic link points to its neighbour."""
        target = self.links.get(path)
        return self.files[f"{path.rpartition('/')[0]}/{target}" if target else path][1]


def make(debs: Iterable[Path], parts: Path, runtime: str) -> tuple[Tree, bytes]:
    """The tree, and the kernel as a bzImage.

    `parts` holds our lists and init, `runtime` is one of RUNTIMES. Raises: BuildError.
    """
    unpacked = Unpacked(debs)
    tree = Tree()
    for name in MERGED:
        tree.link(name, "usr/" + name)
    for name in DIRECTORIES:
        tree.directory(name)
    tree.directory("tmp", 0o1777)
    # Python starts before init can mount /dev, and without RDRAND it takes its hash seed from here.
    tree.character_device("dev/urandom", 1, 9, 0o666)
    for path, text in FILES.items():
        tree.file(path, text.encode())
    tree.file("init", (parts / "init").read_bytes(), 0o755)
    left_out = lines(parts / "stdlib-left-out.txt")
    programs = [*PROGRAMS, RUNTIMES[runtime]]
    for path, (mode, data) in unpacked.files.items():
        if path in programs or path.startswith("etc/iproute2/") or is_wanted_python(path, left_out):
            tree.file(path, data, mode)
    tree.link("usr/bin/python3", "python3.11")
    add_libraries(tree, unpacked)
    add_applets(tree)
    add_modules(tree, unpacked, lines(parts / "modules.txt"))
    return tree, next(data for path, (_, data) in unpacked.files.items() if path.startswith("boot/vmlinuz-"))


def lines(path: Path) -> list[str]:
    """A file's lines without comments and blank ones."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def is_wanted_python(path: str, left_out: list[str]) -> bool:
    """Whether a file belongs to the standard library, and neither it nor a directory above it is left out."""
    if not path.startswith(STDLIB):
        return False
    parts = path.removeprefix(STDLIB).split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return not any(fnmatch.fnmatchcase(name, pattern) for name in above for pattern in left_out)


def add_libraries(tree: Tree, unpacked: Unpacked) -> None:
    """The shared libraries that the tree's programs and protobuf need, and those that these need."""
    tree.file(f"usr/lib64/{LOADER}", unpacked.data(f"{LIBRARIES}/{LOADER}"), 0o755)
    tree.file(f"{LIBRARIES}/{FOR_PROTOBUF}", unpacked.data(f"{LIBRARIES}/{FOR_PROTOBUF}"), 0o755)
    done = {LOADER, FOR_PROTOBUF}
    waiting = [entry.data for entry in tree.entries.values() if stat.S_ISREG(entry.mode)]
    while waiting:
        for name in needed_libraries(waiting.pop()):
            if name in done:
                continue
            path = f"{LIBRARIES}/{name}"
            if path not in unpacked.files and path not in unpacked.links:
                raise BuildError(f"the library {name} is in none of the packages")
            done.add(name)
            tree.file(path, unpacked.data(path), 0o755)
            waiting.append(unpacked.data(path))


def add_applets(tree: Tree) -> None:
    """busybox under every name it answers to, except where the tree has the program itself."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch, "busybox")
        program.write_bytes(tree.entries["usr/bin/busybox"].data)
        program.chmod(0o700)
        names = subprocess.run([program, "--list-full"], check=True, capture_output=True, text=True).stdout
    there = {path.rpartition("/")[2] for path in tree.entries}
    for name in names.split():
        path = "usr/" + name.removeprefix("usr/")
        if path.startswith(("usr/bin/", "usr/sbin/")) and path.rpartition("/")[2] not in there:
            tree.link(path, "/usr/bin/busybox")


def add_modules(tree: Tree, unpacked: Unpacked, wanted: list[str]) -> None:
    """Kernel modules, what they depend on, the indices modprobe reads, and modules.boot for init."""
    paths = {module_name(path): path for path in unpacked.files if path.endswith(".ko")}
    top = next(iter(paths.values())).partition("/kernel/")[0] + "/"
    facts = {name: module_facts(unpacked.data(path)) for name, path in paths.items()}
    chosen, boot = set(), []
    for line in wanted:
        name = line.removeprefix("boot ")
        if name not in paths:
            raise BuildError(f"scripts/guest/modules.txt: {name} is not a module of this kernel")
        chosen.update([name, *dependencies(name, facts)])
        boot += [name] if line.startswith("boot ") else []
    order, aliases = "", ""
    for name in sorted(chosen):
        tree.file(paths[name], unpacked.data(paths[name]))
        first, *others = [paths[each].removeprefix(top) for each in (name, *dependencies(name, facts))]
        order += f"{first}: {' '.join(others)}\n"
        aliases += "".join(f"alias {pattern} {name}\n" for pattern in facts[name]["alias"])
    tree.file(top + "modules.dep", order.encode())
    tree.file(top + "modules.alias", aliases.encode())
    tree.file(top + "modules.symbols", b"")
    tree.file(top + "modules.builtin", unpacked.data(top + "modules.builtin"))
    tree.file(top + "modules.boot", "\n".join(boot).encode())


def module_name(path: str) -> str:
    """The name the kernel gives a module, of its file or of another spelling of the name."""
    return path.rpartition("/")[2].removesuffix(".ko").replace("-", "_")


def module_facts(module: bytes) -> dict[str, list[str]]:
    """The aliases and dependencies that a module names (section .modinfo: NUL-terminated key=value)."""
    found = {key: re.findall(rb"\0%s=([^\0]+)" % key.encode(), module) for key in ("alias", "depends")}
    depends = b",".join(found["depends"]).decode().split(",")
    return {
        "alias": [value.decode() for value in found["alias"]],
        "depends": [module_name(name) for name in depends if name],
    }


def dependencies(name: str, facts: dict[str, dict[str, list[str]]]) -> list[str]:
    """What must be loaded before a module, the last first, as depmod(8) orders it in modules.dep."""
    order: list[str] = []
    for direct in facts[name]["depends"]:
        for module in (direct, *dependencies(direct, facts)):
            if module in order:
                order.remove(module)
            order.append(module)
    return order


def uncompressed(image: bytes) -> bytes:
    """The ELF file in a bzImage, which QEMU starts by its PVH note (kernel: Documentation/x86/boot.rst).

    Raises: BuildError, when the kernel is packed otherwise than Debian 12 does it.
    """
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    start = ((image[0x1F1] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    if payload[:6] != b"\xfd7zXZ\0":
        raise BuildError("the kernel's payload is not compressed by xz")
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
