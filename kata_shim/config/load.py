"""From a file to a `Config`: find it, read it, check it field by field, then against itself and the host."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from kata_shim.config.source import Source, read_text
from kata_shim.config.table import (
    BRIDGES_MOST,
    MAXVCPUS_MOST,
    ROOT_PORTS_MOST,
    SECTIONS,
    BrokenRuleError,
    Config,
    Hypervisor,
)
from kata_shim.errors import invalid
from kata_shim.quoting import quoted

ETC = Path("/etc/kata-shim/configuration.toml")
ENVIRONMENT = "KATA_SHIM_CONFIG"
QEMU, FACTORY, RUNTIME = "hypervisor.qemu", "factory", "runtime"
_STRANGERS_SHOWN = 20
_KINDS = {bool: "true or false", int: "an integer", str: "a string", tuple: "an array of strings"}


def find_config(explicit: str | None, environ: Mapping[str, str] = os.environ, etc: Path = ETC) -> Path:
    """Return the absolute path of the file to use.

    The order: `explicit`, the environment's KATA_SHIM_CONFIG, `etc` if it is there, the shipped file (in the
    installed package, or at the top level of a checkout). Raises `invalid-argument` if `explicit` is "".
    """
    if explicit == "":
        raise invalid('--config: "" is not the path of a file')
    if told := explicit or environ.get(ENVIRONMENT):
        return Path(told).absolute()
    if etc.exists():
        return etc
    package = Path(__file__).parents[1]
    installed = package / etc.name
    return installed if installed.exists() else package.parent / etc.name


def load(file: Path, host_cpus: int | None = None) -> tuple[Config, list[str]]:
    """Return the configuration in `file`, and a warning line for what is unknown or cut to a limit.

    A field that the file leaves out has its default. Raises `not-found` or `permission-denied` if there is no
    reading the file, else `invalid-argument`: `FILE:LINE: [section] field: value is not rule`. The files that
    the fields name are not looked at; see `check_files`.
    """
    return parse(read_text(file), file, host_cpus or os.cpu_count() or 1)


def parse(text: str, file: Path, host_cpus: int) -> tuple[Config, list[str]]:
    """As `load`, on the text of a file; does no I/O."""
    source = Source(text, file)
    document = source.document()
    warnings = _warn_strangers(source, document)
    idle: list[str] = []
    parts: dict[str, Any] = {
        section: _read_section(source, section, row_type, document, idle)
        for section, row_type in SECTIONS.items()
    }
    parts[QEMU] = _settle(source, parts[QEMU], host_cpus, warnings)
    by_name = {section.partition(".")[0]: part for section, part in parts.items()}
    config = Config(**by_name, not_acted_on=tuple(idle), file=file, text=text)
    for section, name, sentence in _contradictions(config):
        raise source.error(section, name, sentence)
    return config, warnings


def _read_section(
    source: Source, section: str, row_type: type[Any], document: dict[str, Any], idle: list[str]
) -> Any:
    """Return the section as its dataclass, each field checked on its own; idle ones noted."""
    given = document
    for part in section.split("."):
        given = given.get(part, {})
    values = {}
    for row in fields(row_type):
        if row.name in given:
            values[row.name] = _read_value(source, section, row, given[row.name])
            if values[row.name] != row.default and not row.metadata["acted"]:
                idle.append(f"[{section}] {row.name}")
    # The default initrd stands for "the usual guest"; who names an image wants that one instead.
    if values.get("image") and "initrd" not in values:
        values["initrd"] = ""
    return row_type(**values)


def _read_value(source: Source, section: str, row: Field[Any], value: object) -> object:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    kind, check = type(row.default), row.metadata["check"]
    if type(value) is not kind:
        raise source.error(section, row.name, f"{quoted(value)} is not {_KINDS[kind]}")
    try:
        checked: object = check(value) if check else value
    except BrokenRuleError as rule:
        raise source.error(section, row.name, f"{quoted(value)} is not {rule}") from None
    return checked


def _settle(source: Source, given: Hypervisor, host_cpus: int, warnings: list[str]) -> Hypervisor:
    """Return [hypervisor.qemu] with the values that depend on the host or are cut to a limit."""
    if not 1 <= given.default_vcpus <= host_cpus:
        sentence = f"{given.default_vcpus} is not within 1..{host_cpus}, the host's CPUs"
        raise source.error(QEMU, "default_vcpus", sentence)
    for name, most in (("default_root_ports", ROOT_PORTS_MOST), ("default_bridges", BRIDGES_MOST)):
        if (value := getattr(given, name)) > most:
            warnings.append(source.say(QEMU, name, f"{value} is more than {most}; {most} are made"))
    return replace(
        given,
        default_maxvcpus=given.default_maxvcpus or min(host_cpus, MAXVCPUS_MOST),
        default_root_ports=min(given.default_root_ports or ROOT_PORTS_MOST, ROOT_PORTS_MOST),
        default_bridges=min(given.default_bridges or 1, BRIDGES_MOST),
        shared_memory=given.shared_memory or given.shared_fs == "virtio-fs",
    )


class _Stranger(NamedTuple):
    """A key that is neither a section nor a field, and the names it may have been meant for."""

    section: str
    key: str
    known: Collection[str]

    def warning(self, source: Source) -> str:
        import difflib  # only who mistypes pays for it

        meant = f"{self.section}.{self.key}" if self.section and self.known is SECTIONS else self.key
        nearest = difflib.get_close_matches(meant[:64], self.known, 1, 0.0)[0]
        return source.say(self.section, self.key, f"unknown, ignored; the nearest known name is {nearest}")


def _warn_strangers(source: Source, document: dict[str, Any]) -> list[str]:
    strangers = list(_strangers(source, document, ""))
    warnings = [stranger.warning(source) for stranger in strangers[:_STRANGERS_SHOWN]]
    if more := strangers[_STRANGERS_SHOWN:]:
        warnings.append(
            source.say(more[0].section, more[0].key, f"unknown, ignored, with {len(more) - 1} more")
        )
    return warnings


def _strangers(source: Source, table: dict[str, Any], section: str) -> Iterator[_Stranger]:
    """Yield what is unknown in `table`. Raises if a known section is no table."""
    for key, value in table.items():
        path = f"{section}.{key}" if section else key
        if path not in SECTIONS and not any(name.startswith(f"{path}.") for name in SECTIONS):
            yield _Stranger(section, key, SECTIONS)
        elif not isinstance(value, dict):
            raise source.error(section, key, f"{quoted(value)} is not a table")
        elif path in SECTIONS:
            names = [row.name for row in fields(SECTIONS[path])]
            yield from (_Stranger(path, name, names) for name in value if name not in names)
        else:
            yield from _strangers(source, value, path)


def _contradictions(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield (section, field, sentence) for each rule between fields that is broken."""
    qemu, factory, runtime = config.hypervisor, config.factory, config.runtime
    if qemu.initrd and qemu.image:
        yield QEMU, "image", "set beside initrd; exactly one of the two must be set"
    if not qemu.initrd and not qemu.image:
        yield QEMU, "initrd", "empty, and so is image; exactly one of the two must be set"
    if qemu.default_maxvcpus < qemu.default_vcpus:
        yield (
            QEMU,
            "default_maxvcpus",
            f"{qemu.default_maxvcpus} is less than default_vcpus ({qemu.default_vcpus})",
        )
    if qemu.shared_fs == "virtio-fs" and not qemu.virtio_fs_daemon:
        yield QEMU, "virtio_fs_daemon", 'empty; shared_fs = "virtio-fs" needs it'
    if factory.enable_template and not qemu.initrd:
        yield FACTORY, "enable_template", "true; it needs an initrd, not an image"
    if factory.enable_template and qemu.shared_fs == "virtio-fs":
        yield FACTORY, "enable_template", 'true; it cannot be with shared_fs = "virtio-fs"'
    if runtime.disable_new_netns and config.netmon.enable_netmon:
        yield (
            RUNTIME,
            "disable_new_netns",
            "true; it cannot be with [netmon] enable_netmon",
        )
    if runtime.disable_new_netns and runtime.internetworking_model != "none":
        model = quoted(runtime.internetworking_model)
        yield RUNTIME, "disable_new_netns", f'true; it needs internetworking_model = "none", not {model}'
