"""configuration.toml: the shipped file against the table, every field's check, the rules between fields."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest

from kata_shim.config import Config, find_config, load, parse
from kata_shim.config.source import Source
from kata_shim.config.table import SECTIONS
from kata_shim.errors import ShimError

pytestmark = pytest.mark.quick

SHIPPED = Path(__file__).parents[2] / "configuration.toml"
FILE = Path("/etc/c.toml")
QEMU = "hypervisor.qemu"

# The fields that the documents' appendix names, in its order.
DOCUMENTED = {
    QEMU: (
        "path kernel initrd image machine_type kernel_params firmware machine_accelerators default_vcpus"
        " default_maxvcpus default_root_ports default_bridges default_memory memory_slots memory_offset"
        " disable_block_device_use shared_fs virtio_fs_daemon virtio_fs_cache_size virtio_fs_cache"
        " block_device_driver block_device_cache_set block_device_cache_direct block_device_cache_noflush"
        " enable_iothreads enable_mem_prealloc enable_hugepages enable_swap enable_debug"
        " disable_nesting_checks msize_9p use_vsock hotplug_vfio_on_root_bus disable_vhost_net entropy_source"
        " guest_hook_path"
    ),
    "factory": "enable_template template_path vm_cache_number vm_cache_endpoint",
    "proxy.kata": "path enable_debug",
    "shim.kata": "path enable_debug enable_tracing",
    "agent.kata": "enable_debug enable_tracing trace_mode trace_type enable_blk_mount",
    "netmon": "enable_netmon path enable_debug",
    "runtime": (
        "enable_debug enable_cpu_memory_hotplug internetworking_model disable_guest_seccomp enable_tracing"
        " disable_new_netns experimental"
    ),
}
OURS = {
    QEMU: "accelerator cpu_model shared_memory agent_timeout hotplug_timeout",
    "factory": "template_wait",
}

# Documented to be off where it is left out; the shipped file turns it on.
SHIPPED_APART = {"enable_template": True, "msize_9p": 131072}


def rows() -> Iterator[tuple[str, Field[Any]]]:
    for section, row_type in SECTIONS.items():
        for row in fields(row_type):
            yield section, row


def parsed(text: str, host_cpus: int = 4) -> tuple[Config, list[str]]:
    return parse(text, FILE, host_cpus)


def one(section: str, name: str, value: str) -> tuple[Config, list[str]]:
    return parsed(f"[{section}]\n# the field\n{name} = {value}\n")


def refusal(text: str, host_cpus: int = 4) -> str:
    with pytest.raises(ShimError) as caught:
        parsed(text, host_cpus)
    assert caught.value.code == "invalid-argument"
    assert caught.value.message.isprintable()
    return caught.value.message


def test_the_table_has_every_documented_field_and_ours() -> None:
    for section, names in DOCUMENTED.items():
        ours = OURS.get(section, "").split()
        assert [row.name for of, row in rows() if of == section] == names.split() + ours
    assert list(SECTIONS) == list(DOCUMENTED)


def test_the_shipped_file_is_the_table() -> None:
    text = SHIPPED.read_text()
    document = tomllib.loads(text)
    lines = text.splitlines()
    source = Source(text, SHIPPED)
    seen = 0
    for section, row in rows():
        table = document
        for part in section.split("."):
            table = table[part]
        value = table[row.name]
        wanted = SHIPPED_APART.get(row.name, row.default)
        assert (tuple(value) if isinstance(value, list) else value) == wanted, f"[{section}] {row.name}"
        above = source.line((*section.split("."), row.name)) - 2
        comment = ""
        while lines[above].startswith("# "):
            comment = lines[above][2:] + " " + comment
            above -= 1
        assert comment, f"[{section}] {row.name} has no comment"
        assert comment.rstrip().endswith("(not yet)") != row.metadata["acted"], f"[{section}] {row.name}"
        seen += 1
    leaves = [line for line in lines if line and not line.startswith(("#", "["))]
    assert len(leaves) == seen, "the shipped file has a field that the table has not"
    assert [line[1:-1] for line in lines if line.startswith("[")] == list(SECTIONS)


def test_the_shipped_file_and_the_empty_one_mean_the_same_but_for_what_is_said_there() -> None:
    shipped, warnings = load(SHIPPED, host_cpus=2)
    assert warnings == []
    assert shipped.not_acted_on == ()
    empty, warnings = parsed("", 2)
    assert warnings == []
    for section in SECTIONS:
        name = section.partition(".")[0]
        plain = getattr(empty, name)
        apart = {field: value for field, value in SHIPPED_APART.items() if hasattr(plain, field)}
        assert getattr(shipped, name) == replace(plain, **apart)
    assert shipped.hypervisor.default_maxvcpus == 2
    assert shipped.text == SHIPPED.read_text()


@pytest.mark.parametrize(("section", "row"), list(rows()), ids=lambda part: getattr(part, "name", part))
def test_every_field_refuses_other_types(section: str, row: Field[Any]) -> None:
    kind = {bool: "true or false", int: "an integer", str: "a string", tuple: "an array of strings"}[
        type(row.default)
    ]
    samples = {"true": bool, "7": int, '"x"': str, "1.5": float, "[1]": list, "1979-05-27": object}
    for sample, of in samples.items():
        if of is not type(row.default):
            message = refusal(f"[{section}]\n# the field\n{row.name} = {sample}\n")
            assert message.startswith(f"{FILE}:3: [{section}] {row.name}: ")
            assert message.endswith(f" is not {kind}")


NUMBERS = {
    "default_vcpus": (1, 4, "within 1..4, the host's CPUs"),
    "default_maxvcpus": (4, 240, "within 0..240"),
    "default_root_ports": (1, 25, "within 0..4294967295"),
    "default_bridges": (1, 5, "within 0..4294967295"),
    "default_memory": (300, 524288, "within 300..524288 MiB"),
    "memory_slots": (0, 256, "within 0..256"),
    "memory_offset": (0, 0xFFFFFFFF, "within 0..4294967295 MiB"),
    "virtio_fs_cache_size": (0, 524288, "within 0..524288 MiB"),
    "msize_9p": (4096, 1 << 20, "within 4096..1048576 bytes"),
    "agent_timeout": (1, 3600, "within 1..3600 seconds"),
    "hotplug_timeout": (1, 3600, "within 1..3600 seconds"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_the_hypervisor(name: str) -> None:
    low, high, rule = NUMBERS[name]
    for value in (low, high):
        config, warnings = one(QEMU, name, str(value))
        assert getattr(config.hypervisor, name) == value
        assert warnings == []
    bad = [-1, 1 << 32] if "4294967295" in rule else [-1, low - 1, high + 1]
    for value in bad if name != "default_maxvcpus" else [-1, 241]:
        assert refusal(f"[{QEMU}]\n\n{name} = {value}") == f"{FILE}:3: [{QEMU}] {name}: {value} is not {rule}"


def test_numbers_that_are_cut_to_a_limit() -> None:
    for name, most, least in (("default_root_ports", 25, 25), ("default_bridges", 5, 1)):
        config, warnings = one(QEMU, name, str(most + 1))
        assert getattr(config.hypervisor, name) == most
        assert warnings == [f"{FILE}:3: [{QEMU}] {name}: {most + 1} is more than {most}; {most} are made"]
        config, warnings = one(QEMU, name, "0")
        assert getattr(config.hypervisor, name) == least
        assert warnings == []


def test_virtio_fs_shares_the_memory() -> None:
    assert one(QEMU, "shared_fs", '"virtio-fs"')[0].hypervisor.shared_memory
    assert not parsed("")[0].hypervisor.shared_memory


def test_cpus_depend_on_the_host() -> None:
    assert parsed("", 1)[0].hypervisor.default_maxvcpus == 1
    assert parsed("", 400)[0].hypervisor.default_maxvcpus == 240
    assert "is not within 1..1, the host's CPUs" in refusal(f"[{QEMU}]\ndefault_vcpus = 2", 1)
    message = refusal(f"[{QEMU}]\ndefault_vcpus = 3\ndefault_maxvcpus = 2")
    assert message == f"{FILE}:3: [{QEMU}] default_maxvcpus: 2 is less than default_vcpus (3)"


NAMES = {
    (QEMU, "machine_type"): "q35 pc virt",
    (QEMU, "shared_fs"): "virtio-9p virtio-fs",
    (QEMU, "virtio_fs_cache"): "none auto always",
    (QEMU, "block_device_driver"): "virtio-scsi virtio-blk virtio-mmio nvdimm",
    (QEMU, "accelerator"): "auto kvm tcg",
    ("agent.kata", "trace_mode"): "dynamic static",
    ("agent.kata", "trace_type"): "isolated collated",
    ("runtime", "internetworking_model"): "macvtap tcfilter bridged none",
}


@pytest.mark.parametrize(("section", "name"), NAMES)
def test_names(section: str, name: str) -> None:
    names = NAMES[section, name].split()
    for value in names:
        config, warnings = one(section, name, f'"{value}"')
        assert getattr(getattr(config, section.partition(".")[0]), name) == value
        assert warnings == []
    for value in ("", "Invalid", names[0].upper(), f" {names[0]}", f"{names[0]}\\n"):
        message = refusal(f'[{section}]\n\n{name} = "{value}"')
        assert message == f'{FILE}:3: [{section}] {name}: "{value}" is not one of {", ".join(names)}'


PATHS = [
    (section, row.name) for section, row in rows() if isinstance(row.default, str) and row.default[:1] == "/"
]
EMPTY_PATHS = [
    *[(QEMU, "image"), (QEMU, "firmware"), (QEMU, "guest_hook_path")],
    *[("proxy.kata", "path"), ("shim.kata", "path"), ("netmon", "path")],
]


@pytest.mark.parametrize(("section", "name"), PATHS + EMPTY_PATHS)
def test_paths(section: str, name: str) -> None:
    optional = (section, name) in EMPTY_PATHS or name in ("initrd", "virtio_fs_daemon")
    other = 'initrd = ""' if name == "image" else ""
    config, _ = parsed(f'[{section}]\n{other}\n{name} = "/some/where"')
    assert getattr(getattr(config, section.partition(".")[0]), name) == "/some/where"
    for value in ("relative", "./x", "~/x", "/nul\\u0000"):
        assert " is not an absolute path" in refusal(f'[{section}]\n{name} = "{value}"')
    if optional and name != "initrd":
        assert one(section, name, '""')[1] == []
    elif not optional:
        assert " is not an absolute path" in refusal(f'[{section}]\n{name} = ""')


def test_other_texts() -> None:
    assert (
        one(QEMU, "machine_accelerators", '",, abc ,,, 123 ,,"')[0].hypervisor.machine_accelerators
        == "abc,123"
    )
    assert one(QEMU, "machine_accelerators", '" , "')[0].hypervisor.machine_accelerators == ""
    assert '"a b" is not a comma list of words' in refusal(f'[{QEMU}]\nmachine_accelerators = "a b"')
    assert '"a=b, accel=tcg" is not free of accel=, which `accelerator` says' in refusal(
        f'[{QEMU}]\nmachine_accelerators = "a=b, accel=tcg"'
    )
    assert one(QEMU, "kernel_params", '"a=b c"')[0].hypervisor.kernel_params == "a=b c"
    for value in ("a\\nb", "é", "x" * 2048):
        assert "is not printable ASCII of at most 2047" in refusal(f'[{QEMU}]\nkernel_params = "{value}"')
    assert one(QEMU, "cpu_model", '"max,-x2apic"')[0].hypervisor.cpu_model == "max,-x2apic"
    assert "is not a CPU model" in refusal(f'[{QEMU}]\ncpu_model = "a b"')
    assert "at most 107" in refusal(f'[factory]\nvm_cache_endpoint = "/{"x" * 107}"')
    assert one("factory", "vm_cache_endpoint", f'"/{"x" * 106}"')[1] == []
    for number in (-1, 1001):
        assert "is not within 0..1000" in refusal(f"[factory]\nvm_cache_number = {number}")
    message = refusal('[runtime]\nexperimental = ["newstore"]')
    assert message.endswith("is not an empty array: this version has no experimental features")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[hypervisor.qemu]\ninitrd = "/i"\nimage = "/m"',
            "3: [hypervisor.qemu] image: set beside initrd; exactly one of the two must be set",
        ),
        (
            '[hypervisor.qemu]\ninitrd = ""',
            "2: [hypervisor.qemu] initrd: empty, and so is image; exactly one of the two must be set",
        ),
        (
            '[hypervisor.qemu]\nimage = "/m"\n[factory]\nenable_template = true',
            "4: [factory] enable_template: true; it needs an initrd, not an image",
        ),
        (
            '[hypervisor.qemu]\nshared_fs = "virtio-fs"\n[factory]\nenable_template = true',
            '4: [factory] enable_template: true; it cannot be with shared_fs = "virtio-fs"',
        ),
        (
            '[hypervisor.qemu]\nshared_fs = "virtio-fs"\nvirtio_fs_daemon = ""',
            '3: [hypervisor.qemu] virtio_fs_daemon: empty; shared_fs = "virtio-fs" needs it',
        ),
        (
            "[netmon]\nenable_netmon = true\n[runtime]\ndisable_new_netns = true",
            "4: [runtime] disable_new_netns: true; it cannot be with [netmon] enable_netmon",
        ),
        (
            "[runtime]\ndisable_new_netns = true",
            '2: [runtime] disable_new_netns: true; it needs internetworking_model = "none", not "tcfilter"',
        ),
    ],
)
def test_rules_between_fields(text: str, message: str) -> None:
    assert refusal(text) == f"{FILE}:{message}"


def test_what_the_rules_between_fields_allow() -> None:
    config, _ = parsed('[hypervisor.qemu]\nimage = "/m"')
    assert (config.hypervisor.initrd, config.hypervisor.image) == ("", "/m")
    assert parsed("[factory]\nenable_template = true")[0].factory.enable_template
    text = '[runtime]\ndisable_new_netns = true\ninternetworking_model = "none"'
    assert parsed(text)[0].runtime.disable_new_netns


def test_what_is_not_acted_on_is_listed() -> None:
    text = '[hypervisor.qemu]\nenable_swap = true\nmsize_9p = 8192\ncpu_model = "max"\n'
    text += "[runtime]\nenable_debug = true\nenable_tracing = true"
    assert parsed(text)[0].not_acted_on == ("[hypervisor.qemu] enable_swap", "[runtime] enable_tracing")


def test_the_file_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = tmp_path / "configuration.toml"
    told = {"KATA_SHIM_CONFIG": "/by/environment"}
    assert find_config("/by/option", told, etc) == Path("/by/option")
    assert find_config(None, told, etc) == Path("/by/environment")
    assert find_config(None, {"KATA_SHIM_CONFIG": ""}, etc) == SHIPPED
    assert find_config(None, {}, etc) == SHIPPED
    etc.write_text("")
    assert find_config(None, {}, etc) == etc
    monkeypatch.chdir(tmp_path)
    assert find_config("mine.toml", told, etc) == tmp_path / "mine.toml"
    with pytest.raises(ShimError, match=r'^--config: "" is not'):
        find_config("", told, etc)
