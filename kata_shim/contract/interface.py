"""A NIC as `kata-network` reads and prints it: the how-to and appendix table 1, in rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address

from kata_shim.contract.fields import (
    AF_INET,
    AF_INET6,
    family_of,
    missing,
    need_unicast,
    read_integer,
    read_ip,
    read_name,
    read_object,
    read_prefix,
    read_text,
    warn_unknown,
    wrong,
)
from kata_shim.errors import ShimError, invalid
from kata_shim.quoting import quoted

MTU_LEAST = 46
MTU_MOST = 9600
# MAX_TAP_QUEUES in the kernel's drivers/net/tun.c.
QUEUES_MOST = 256
SOCKET_PATH_MOST = 128

FIELDS = ("device", "name", "IPAddresses", "mtu", "hwAddr", "vhostUserSocket", "queues")
# What our own answers carry beside the fields that are read, so that an answer can be fed back in.
IGNORED = ("pciAddr", "linkType", "rawFlags", "Family")
_WHAT = "that describes a NIC"

# sysctl_dev_name_is_allowed() in the kernel's include/net/ip.h refuses the first two, so such a NIC cannot
# exist; the third is in every network namespace already.
_TAKEN = {"all": "a name the kernel keeps for itself", "default": "a name the kernel keeps for itself"}
_TAKEN_IN_GUEST = {**_TAKEN, "lo": "the guest's loopback device"}

_MAC_RULE = "a MAC address of six octets such as 02:42:20:6f:a3:69"
_MAC = re.compile(
    r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}|[0-9a-f]{2}(?:-[0-9a-f]{2}){5}"
    r"|[0-9a-f]{4}(?:\.[0-9a-f]{4}){2}|[0-9a-f]{12}",
    re.IGNORECASE | re.ASCII,
)
_SOCKET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class Address:
    """One IP address of a NIC: `family` AF_INET or AF_INET6, `prefix` in bits.

    `address` is the user's own spelling, because the documented answer repeats what was passed in; equality,
    the list and the guest go by `canonical`.
    """

    family: int
    address: str = field(compare=False)
    prefix: int
    canonical: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "canonical", str(ip_address(self.address)))

    def __str__(self) -> str:
        """Return `address/prefix`, canonical (RFC 5952)."""
        return f"{self.canonical}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class Interface:
    """A valid NIC description; `device` is the host's name for it, `name` the guest's, `mtu` in bytes.

    `hw_addr` is lower-case with colons. `queues` is as given, 0 for absent; `queue_pairs` is what it means.
    With a `vhost_user_socket` the NIC is a vhost-user NIC and `device` names no tap.
    """

    device: str
    name: str
    mtu: int
    hw_addr: str
    addresses: tuple[Address, ...] = ()
    vhost_user_socket: str = ""
    queues: int = 0

    @property
    def queue_pairs(self) -> int:
        """The number of receive/transmit queue pairs: `queues`, where 0 and 1 both mean one."""
        return max(1, self.queues)


def parse_interface(value: object) -> tuple[Interface, list[str]]:
    """Return the NIC that add-iface or update-iface was given, and the warnings (at most one line).

    `value` is any JSON value. Raises `invalid-argument` naming the first field that breaks its rule, in the
    documents' order of fields. Whether the socket exists, or the device is free, is not looked at here.
    """
    fields, unknown = read_object(value, _WHAT, FIELDS, IGNORED)
    device = read_name(fields, "device")
    if device in _TAKEN:
        raise invalid(f"device: {quoted(device)} is {_TAKEN[device]}; use another name")
    name = read_name(fields, "name")
    if name in _TAKEN_IN_GUEST:
        raise invalid(f"name: {quoted(name)} is {_TAKEN_IN_GUEST[name]}; use another name")
    addresses = _read_addresses(fields.get("IPAddresses"), unknown)
    if "mtu" not in fields:
        raise missing("mtu", f"within {MTU_LEAST}..{MTU_MOST}")
    interface = Interface(
        device,
        name,
        read_integer("mtu", fields["mtu"], MTU_LEAST, MTU_MOST),
        _read_mac(fields.get("hwAddr")),
        addresses,
        _read_socket(fields.get("vhostUserSocket")),
        read_integer("queues", fields.get("queues", 0), 0, QUEUES_MOST),
    )
    return interface, warn_unknown(unknown)


def parse_name(value: object) -> tuple[str, list[str]]:
    """Return the `name` that del-iface was given, and the warnings.

    No other field is read, not even for its mistakes (appendix, table 1). Raises `invalid-argument`.
    """
    fields, unknown = read_object(value, "with the NIC's name", ("name",), (*FIELDS, *IGNORED))
    return read_name(fields, "name"), warn_unknown(unknown)


def _read_addresses(value: object, unknown: list[str]) -> tuple[Address, ...]:
    path = "IPAddresses"
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(path, value, 'an array of at most one {"address","mask"}')
    if len(value) > 1:
        raise invalid(f"{path}: {len(value)} entries are more than the one address a NIC may have")
    return tuple(_read_address(entry, f"{path}[{i}]", unknown) for i, entry in enumerate(value))


def _read_address(value: object, path: str, unknown: list[str]) -> Address:
    fields, strange = read_object(value, "with address and mask", ("address", "mask"), ("Family",), path)
    unknown += strange
    for key, rule in (("address", "an IPv4 or IPv6 address"), ("mask", "a prefix length")):
        if key not in fields:
            raise missing(f"{path}.{key}", rule)
    text = fields["address"]
    address = read_ip(f"{path}.address", text)
    need_unicast(f"{path}.address", address, str(text))
    # addrconf.c refuses ::1 everywhere but on lo; 127.0.0.0/8 it takes on any device.
    if address.version == 6 and address.is_loopback:
        raise wrong(f"{path}.address", text, "an address the kernel allows outside lo")
    return Address(family_of(address), str(text), read_prefix(f"{path}.mask", fields["mask"], address))


def _read_mac(value: object) -> str:
    if value is None:
        raise missing("hwAddr", _MAC_RULE)
    text = read_text("hwAddr", value, _MAC_RULE)
    if not _MAC.fullmatch(text):
        raise wrong("hwAddr", value, _MAC_RULE)
    octets = bytes.fromhex(re.sub("[:.-]", "", text))
    if octets[0] & 1:
        raise wrong("hwAddr", value, "a unicast address (the lowest bit of its first octet is set)")
    if not any(octets):
        raise wrong("hwAddr", value, "a non-zero address")
    return octets.hex(":")


def _read_socket(value: object) -> str:
    path = "vhostUserSocket"
    if value is None or value == "":
        return ""
    text = read_text(path, value, "the path of a socket")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise wrong(path, value, "UTF-8 text") from None
    if length > SOCKET_PATH_MOST:
        raise wrong(path, value, f"at most {SOCKET_PATH_MOST} bytes long (it has {length})")
    if "\0" in text or not text.startswith("/"):
        raise wrong(path, value, "an absolute path")
    if not _SOCKET_NAME.fullmatch(text.rpartition("/")[2]):
        raise wrong(path, value, "a path whose last part is of [A-Za-z0-9.-], the first a letter")
    return text


def _render(
    interface: Interface, families: dict[int, int] | None, pci_addr: str, link_type: str
) -> dict[str, object]:
    """Return the documented object in its key order; `families` maps AF_* to the Family to print."""
    rendered: dict[str, object] = {"device": interface.device, "name": interface.name}
    if interface.addresses:
        rendered["IPAddresses"] = [
            {"Family": (families or {}).get(a.family, a.family), "Address": a.address, "Mask": str(a.prefix)}
            for a in interface.addresses
        ]
    rendered["mtu"] = interface.mtu
    rendered["hwAddr"] = interface.hw_addr
    if pci_addr:
        rendered["pciAddr"] = pci_addr
    if link_type:
        rendered["linkType"] = link_type
    if interface.vhost_user_socket:
        rendered["vhostUserSocket"] = interface.vhost_user_socket
    if interface.queues:
        rendered["queues"] = interface.queues
    return rendered


def render_interface(interface: Interface, pci_addr: str) -> dict[str, object]:
    """Return what add-iface answers, keys in the documented order; `parse_interface` takes it back.

    The address is in the user's own spelling, the MAC in ours. `pci_addr` is the slot's path, `01.0/00`.
    """
    return _render(interface, None, pci_addr, "")


def render_failed_delete(interface: Interface) -> dict[str, object]:
    """Return what del-iface prints of a NIC that did not go away; `parse_interface` takes it back.

    The how-to shows Family 0 for an IPv4 address here, where add-iface prints 2: it is the agent protocol's
    enum IPFamily (0 IPv4, 1 IPv6), not AF_*.
    """
    link_type = "vhost-user" if interface.vhost_user_socket else "tap"
    return _render(interface, {AF_INET: 0, AF_INET6: 1}, "", link_type)


def render_listed(interface: Interface) -> dict[str, object]:
    """Return the NIC as one element of what list-ifaces prints; addresses are canonical, `ip/prefix`."""
    return {
        "name": interface.name,
        "mac": interface.hw_addr,
        "ip": [str(address) for address in interface.addresses],
        "mtu": interface.mtu,
    }


def to_record(interface: Interface) -> dict[str, object]:
    """Return the NIC as JSON for the sandbox's record: the same form that a user passes in."""
    return render_interface(interface, "")


def from_record(value: object) -> Interface:
    """Return the NIC that `to_record` wrote. Raises `data-loss` if the record does not hold a valid one."""
    try:
        return parse_interface(value)[0]
    except ShimError as error:
        raise ShimError("data-loss", f"the sandbox's record is damaged: {error.message}") from error
