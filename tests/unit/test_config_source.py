"""Files that are missing or not TOML, names nobody knows, lines of keys, and the files that are named."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kata_shim.config import check_files, load, parse
from kata_shim.config.source import SIZE_MOST, Source
from kata_shim.config.table import SECTIONS
from kata_shim.errors import ShimError

pytestmark = pytest.mark.quick

FILE = Path("/etc/c.toml")
QEMU = "hypervisor.qemu"


def refusal(file: Path, code: str = "invalid-argument") -> str:
    with pytest.raises(ShimError) as caught:
        load(file, host_cpus=2)
    assert caught.value.code == code
    return caught.value.message.removeprefix(str(file))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    assert refusal(file, "not-found") == ": no such file; name the configuration with --config"
    assert refusal(tmp_path) == ": cannot be read: Is a directory"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == ": is not a regular file"
    file.symlink_to(file)
    assert refusal(file).startswith(": cannot be read: Too many levels")
    assert refusal(tmp_path / "fifo" / "x").startswith(": cannot be read: Not a directory")
    assert "cannot be read" in refusal(Path("/nul\0"))


def test_size_and_encoding(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("#" * SIZE_MOST)
    assert load(file, host_cpus=2)[1] == []
    file.write_text("#" * (SIZE_MOST + 1))
    assert refusal(file) == ": is longer than 1 MiB"
    file.write_bytes(b"# fine\n# \xff\n")
    assert refusal(file) == ":2: is not UTF-8 (byte 0xff)"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("[a]\nb", ":2: is not TOML: "),
        ("a = 1\na = 2", ":2: is not TOML: "),
        ('\n\na = "\n', ":3: is not TOML: "),
        ("a = [\n\n", ":3: is not TOML: "),
        ("a = " + "[" * 50_000, ": is not TOML that can be read: nested too deeply"),
        ("a = " + "9" * 5000, ":1: is not TOML: "),
    ],
)
def test_not_toml(tmp_path: Path, text: str, start: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert refusal(file).startswith(start)


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("[hypervisor.qemu]\ndefault_memroy = 5", "2: [hypervisor.qemu] default_memroy: {} default_memory"),
        ("[runtime]\n\n'enable\tdebug' = 5", r'3: [runtime] "enable\tdebug": {} enable_debug'),
        ("x = 5", "1: x: {} proxy.kata"),
        ("\n[hypervisor.firecracker]\npath = 1", "2: [hypervisor] firecracker: {} hypervisor.qemu"),
        ("[netmonitor]", "1: netmonitor: {} netmon"),
    ],
)
def test_unknown_names_are_warnings(text: str, warning: str) -> None:
    assert parse(text, FILE, 2)[1] == [
        f"{FILE}:{warning.format('unknown, ignored; the nearest known name is')}"
    ]


def test_many_unknown_names_cost_little() -> None:
    text = "[hypervisor.qemu]\n" + "".join(f"field{i} = 1\n" for i in range(20_000))
    warnings = parse(text, FILE, 2)[1]
    assert len(warnings) == 21
    assert warnings[-1] == f"{FILE}:22: [{QEMU}] field20: unknown, ignored, with 19979 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hypervisor = 3", "1: hypervisor: 3 is not a table"),
        ("[hypervisor]\nqemu = []", "2: [hypervisor] qemu: an array is not a table"),
        ("[[runtime]]", "1: runtime: an array is not a table"),
    ],
)
def test_a_section_must_be_a_table(text: str, message: str) -> None:
    with pytest.raises(ShimError) as caught:
        parse(text, FILE, 2)
    assert caught.value.message == f"{FILE}:{message}"


LINES = r'''# path = 1
[ hypervisor . "qemu" ] # path = 2
kernel_params = """
path = 4
[runtime] \""" """ # five
  path="/x" # initrd = 6
machine_accelerators = \'\'\'
firmware = 8 \'\'\'\'\'
'initrd' = "# \" = ["
	image
'''.replace("\\'", "'")


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        (LINES.removesuffix("\timage\n"), (*QEMU.split("."), "path"), 6),
        (LINES.removesuffix("\timage\n"), (*QEMU.split("."), "initrd"), 9),
        (LINES.removesuffix("\timage\n"), (*QEMU.split("."), "kernel_params"), 3),
        (LINES.removesuffix("\timage\n"), (*QEMU.split("."), "firmware"), 2),
        (LINES.removesuffix("\timage\n"), ("runtime",), 0),
        ("a = [ # [x]\n'a', [\n],\n]\nb = 1", ("b",), 5),
        ("a = [\n{ b = 1 },\n]\n[c]\nb = 1", ("c", "b"), 5),
        ("hypervisor.qemu.path = 1", ("hypervisor", "qemu", "path"), 1),
        ("\n[hypervisor]\n\nqemu.path = 1", ("hypervisor", "qemu", "path"), 4),
        ("\nhypervisor = {qemu = {path = 1}}", ("hypervisor", "qemu", "path"), 2),
        ("\r\n[a]\r\nb = 1\r\n", ("a", "b"), 3),
        ("a = 1.5\nb = 1979-05-27T07:32:00Z\nc = 1", ("c",), 3),
        ("[[a]]\nb=1\n[[a]]\n[c.d]", ("c",), 4),
        ("", ("a",), 0),
    ],
)
def test_lines(text: str, path: tuple[str, ...], line: int) -> None:
    tomllib.loads(text)
    assert Source(text, FILE).line(path) == line


SNIPPETS = st.sampled_from(
    [
        *(
            "[hypervisor.qemu]\n",
            "[factory]\n",
            "[x]\n",
            "path",
            "initrd",
            "default_vcpus",
            "image = ",
            " = ",
            "=",
        ),
        *('"', "'", '"""', "'''", "\n", "\r\n", "#", "[", "]", "{", "}", ",", ".", "\\", " "),
        *("1", "true", '"/x"', "é"),
    ]
)


@given(st.lists(SNIPPETS, max_size=40).map("".join) | st.text())
@settings(deadline=None, max_examples=400)
@example("[hypervisor.qemu]\ndefault_vcpus = 99")
def test_any_text_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        config, warnings = parse(text, FILE, 2)
    except ShimError as error:
        warnings = [error.message]
    else:
        assert config.text == text
    for line in warnings:
        assert "\n" not in line
        assert line.startswith(f"{FILE}")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("/x")


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_the_line_of_every_key_is_found(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.text("abc_-09", min_size=1, max_size=5), unique=True, max_size=8))
    values = st.sampled_from(
        ["1", '"a\\"b = 1"', "'x = '", "[\n1,\n[2]]", "{ a = 1, b.c = [2] }", '"""\nz = 1\n"""']
    )
    text, expected = "", {}
    for key in keys:
        text += data.draw(st.sampled_from(["", "\n", "# a = 1\n", "  "]))
        expected[key] = text.count("\n") + 1
        text += f"{key} = {data.draw(values)}{data.draw(st.sampled_from(['', ' # b = 1']))}\n"
    assert set(tomllib.loads(text)) == set(expected)
    source = Source(text, FILE)
    assert {key: source.line((key,)) for key in keys} == expected


@pytest.fixture
def guest(tmp_path: Path) -> dict[str, Any]:
    """The files that a configuration names, all there."""
    named: dict[str, Any] = {"entropy_source": "/dev/urandom", "default_memory": 300}
    for name in ("path", "kernel", "initrd", "firmware"):
        (tmp_path / name).write_bytes(b"x")
        named[name] = str(tmp_path / name)
    (tmp_path / "path").chmod(0o755)
    return named


def trouble(named: dict[str, Any]) -> str | None:
    lines = [f"{name} = {value!r}" for name, value in named.items()]
    config, _ = parse("\n".join([f"[{QEMU}]", *lines]), FILE, 2)
    try:
        check_files(config)
    except ShimError as error:
        return error.message if error.code == "failed-precondition" else pytest.fail(repr(error))
    return None


def test_files_that_are_there(guest: dict[str, Any]) -> None:
    assert trouble(guest) is None
    assert trouble({**guest, "firmware": ""}) is None
    image = guest.pop("initrd")
    assert trouble({**guest, "image": image}) is None


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("path", "QEMU's program", "install it (Debian: qemu-system-x86)"),
        ("kernel", "the guest's kernel", "make it with scripts/build-guest"),
        ("initrd", "the guest's initrd", "make it with scripts/build-guest"),
        ("firmware", "the firmware", 'install it, or use QEMU\'s own with ""'),
    ],
)
def test_files_that_are_not(guest: dict[str, Any], name: str, what: str, remedy: str) -> None:
    file = Path(guest[name])
    line = 2 + list(guest).index(name)
    file.unlink()
    start = f"{FILE}:{line}: [{QEMU}] {name}: {file} ({what}) "
    end = f"; {remedy}, or correct the field"
    assert trouble(guest) == f"{start}cannot be used: No such file or directory{end}"
    file.mkdir()
    assert trouble(guest) == f"{start}is not a regular file{end}"


def test_qemu_must_be_a_program(guest: dict[str, Any]) -> None:
    file = Path(guest["path"])
    file.chmod(stat.S_IRUSR)
    message = trouble(guest)
    assert message is not None
    assert "must not be executed" in message


def test_entropy_may_be_a_device(guest: dict[str, Any]) -> None:
    assert "is not a regular file or a character device" in str(trouble({**guest, "entropy_source": "/dev"}))
    assert trouble({**guest, "entropy_source": guest["kernel"]}) is None


def test_memory_must_hold_the_initrd(guest: dict[str, Any]) -> None:
    os.truncate(guest["initrd"], (300 << 20) - 1)
    assert trouble(guest) is None
    os.truncate(guest["initrd"], 300 << 20)
    line = 2 + list(guest).index("default_memory")
    start = f"{FILE}:{line}: [{QEMU}] default_memory: 300 MiB cannot hold the initrd of 300 MiB"
    assert trouble(guest) == f"{start} ({guest['initrd']})"


def test_every_section_can_be_given_whole() -> None:
    text = "".join(f"[{section}]\n" for section in SECTIONS)
    assert parse(text, FILE, 2)[1] == []
