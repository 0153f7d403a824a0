"""scripts/build-guest: the same inputs give the same bytes, and only what has changed is made again."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PROJECT = Path(__file__).resolve().parents[2]
CACHE = Path("/var/cache/kata-shim")
FILES = ("vmlinuz", "vmlinux", "initrd", "fingerprint")


def build_guest(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [PROJECT / "scripts/build-guest", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def build(source: Path, output: Path, cache: Path = CACHE) -> str:
    """Build the image and return what was said."""
    done = build_guest("--source", source, "--output", output, "--cache", cache)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def sums(output: Path) -> dict[str, str]:
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in FILES}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of our own: the real one may be edited while the tests run."""
    top = tmp_path_factory.mktemp("source")
    shutil.copytree(PROJECT / "kata_shim", top / "kata_shim")
    return top


@pytest.fixture(scope="module")
def image(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("image") / "guest"
    build(source, output)
    return output


def test_an_empty_cache_gives_the_same_bytes(source: Path, image: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(CACHE / "packages", cache / "packages", copy_function=os.link)
    assert "unpacking" in build(source, tmp_path / "guest", cache)
    assert sums(tmp_path / "guest") == sums(image)
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {
        *("base", "libraries", "lock", "packages", "packages.json")
    }


def test_a_damaged_package_in_the_cache_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no network here to download it again, which is an error in words."""
    (tmp_path / "apt.conf").write_text('Acquire::Retries "0";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    packages = tmp_path / "cache" / "packages"
    shutil.copytree(CACHE / "packages", packages, copy_function=os.link)
    shutil.copy(CACHE / "packages.json", tmp_path / "cache")
    damaged = next(packages.glob("libmnl0_*.deb"))
    content = damaged.read_bytes()
    damaged.unlink()  # the cache's own file stays as it is
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = build_guest("--source", source, "--output", tmp_path / "guest", "--cache", tmp_path / "cache")
    assert done.returncode == 1
    assert f"{damaged} has another SHA256 than apt tells: it is removed\n" in done.stdout
    assert done.stderr.startswith("build-guest: apt-get download: ")
    assert not damaged.exists()
    assert not (tmp_path / "guest").exists()


def test_unchanged_inputs_build_nothing(source: Path, image: Path) -> None:
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(image.iterdir())]
    assert build(source, image) == ""
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(image.iterdir())] == before


def test_a_changed_agent_replaces_its_own_layer_only(source: Path, image: Path, tmp_path: Path) -> None:
    changed = tmp_path / "source"
    shutil.copytree(source, changed)
    with open(changed / "kata_shim/guest/main.py", "a") as agent:
        agent.write("\nCHANGED = True\n")
    output = tmp_path / "guest"
    shutil.copytree(image, output)
    said = build(changed, output)
    assert said.splitlines() == [said.strip()]
    assert "is ready" in said
    old, new = sums(image), sums(output)
    assert {name for name in FILES if old[name] != new[name]} == {"initrd", "fingerprint"}
    assert b"CHANGED = True" in (output / "initrd").read_bytes()


def test_another_checkout_of_the_same_files_gives_the_same_bytes(
    source: Path, image: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "elsewhere")
    build(tmp_path / "elsewhere", tmp_path / "guest")
    assert sums(tmp_path / "guest") == sums(image)


def test_two_builders_at_once_agree(source: Path, image: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [PROJECT / "scripts/build-guest", "--source", source]
    command += ["--output", tmp_path / "guest"]
    builders = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"
    ]
    said = [builder.communicate(timeout=120) for builder in builders]
    assert sorted(len(out.splitlines()) for out, _ in said) == [0, 1]
    assert [error for _, error in said] == ["", ""]
    assert sums(tmp_path / "guest") == sums(image)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    done = build_guest("--source", tmp_path, "--output", tmp_path / "guest")
    assert done.returncode == 1
    assert (
        done.stderr
        == f"build-guest: {tmp_path}/kata_shim/__init__.py is missing: has scripts/setup been run?\n"
    )
    assert not (tmp_path / "guest").exists()
