"""Debian packages: which versions apt would take, fetching them, and reading files out of them."""

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

KERNEL = "linux-image-amd64"
MERGED = ("bin", "sbin", "lib", "lib64")  # symbolic links into usr, as on an installed Debian


class BuildError(Exception):
    """One line that says what could not be done and why."""


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file(self) -> str:
        """The name that `apt-get download` gives the file."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def resolve(names: list[str], memory: Path) -> list[Package]:
    """The packages in the versions apt would install; asks apt only if its lists have changed since.

    KERNEL stands for the newest kernel, which that empty package depends on. Raises: BuildError.
    """
    key = hashlib.sha256(json.dumps([names, *_apt_state()]).encode()).hexdigest()
    if memory.exists() and (remembered := json.loads(memory.read_text()))["key"] == key:
        return [Package(**package) for package in remembered["packages"]]
    kernel = _show([KERNEL])[KERNEL]["Depends"].split()[0]
    wanted = [kernel if name == KERNEL else name for name in names]
    shown = _show(wanted)
    if missing := [name for name in wanted if "SHA256" not in shown.get(name, {})]:
        raise BuildError(f"apt cannot download {' '.join(missing)}: is apt-get update needed?")
    fields = ("Package", "Version", "Architecture", "SHA256")
    packages = [Package(*(shown[name][field] for field in fields)) for name in wanted]
    memory.write_text(
        json.dumps({"key": key, "packages": [asdict(package) for package in packages]}, indent=1)
    )
    return packages


def _apt_state() -> list[str]:
    """What apt's choice of versions depends on, without reading it: its lists and its configuration."""
    seen = []
    for top in ("/var/lib/apt/lists", "/etc/apt"):
        for directory, _, names in sorted(os.walk(top)):
            for path in sorted(os.path.join(directory, name) for name in names if name != "lock"):
                status = os.stat(path)
                seen.append(f"{path} {status.st_mtime_ns} {status.st_size}")
    return seen


def _show(names: list[str]) -> dict[str, dict[str, str]]:
    """The one-line fields of packages known to apt, by name."""
    command = ["apt-cache", "show", "--no-all-versions", *names]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise BuildError(f"{answer.stderr.strip().splitlines()[-1]}: is apt-get update needed?")
    found: dict[str, dict[str, str]] = {}
    for paragraph in answer.stdout.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith(" ") and ": " in line]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields:
            found.setdefault(fields["Package"], fields)
    return found


def fetch(packages: list[Package], directory: Path) -> None:
    """Have the packages' files, with the sums apt tells, and no others in a directory. Raises: BuildError."""
    directory.mkdir(parents=True, exist_ok=True)
    if missing := [package for package in packages if not _intact(package, directory)]:
        print(f"build-guest: downloading {len(missing)} Debian packages", flush=True)
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download"]
        command += [f"{package.name}={package.version}" for package in missing]
        answer = subprocess.run(command, cwd=directory, stderr=subprocess.PIPE, text=True)
        if answer.returncode:
            raise BuildError(f"apt-get download: {answer.stderr.strip().splitlines()[-1]}")
        for package in missing:
            if not _intact(package, directory):
                raise BuildError(f"apt-get download: {package.file} is not the file that apt names")
    for path in directory.glob("*.deb"):
        if path.name not in {package.file for package in packages}:
            path.unlink()


def _intact(package: Package, directory: Path) -> bool:
    """Whether a package's file is there; one of another content is taken away."""
    path = directory / package.file
    if not path.exists():
        return False
    if hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
        return True
    print(f"build-guest: {path} has another SHA256 than apt tells: it is removed", flush=True)
    path.unlink()
    return False


def members(deb: Path) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """(path as on a Debian with merged /usr, header, content) of a package's files and symbolic links."""
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacker,
        tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            if path.partition("/")[0] in MERGED:
                path = "usr/" + path
            if member.issym():
                yield path, member, b""
            elif member.isfile() and (content := archive.extractfile(member)):
                yield path, member, content.read()
