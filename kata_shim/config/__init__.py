"""configuration.toml: read, checked field by field, and turned into frozen dataclasses."""

from kata_shim.config.files import check_files, refusal
from kata_shim.config.load import find_config, load, parse
from kata_shim.config.table import Agent, Config, Factory, Hypervisor, Netmon, Proxy, Runtime, Shim

__all__ = [
    "Agent",
    "Config",
    "Factory",
    "Hypervisor",
    "Netmon",
    "Proxy",
    "Runtime",
    "Shim",
    "check_files",
    "find_config",
    "load",
    "parse",
    "refusal",
]
