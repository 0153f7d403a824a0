"""IPVS without a kernel: ipvsadm's language, the kernel's messages, and ipvsadm's listings.

Everything here is pure, and may be used for itself:

    from kata_shim.ipvs.language import parse
    from kata_shim.ipvs.netlink import NLM_F_ACK
    from kata_shim.ipvs.wire import message

    command = parse("-A -t 10.10.11.12:100 -s rr -p 3000".split())
    message(command, family, sequence=1, flags=NLM_F_ACK)  # bytes for a generic netlink socket

`language.parse` raises `command.UsageError`, `netlink.read` and `wire.read_…` raise `netlink.WireError`;
nothing else is raised, whatever the words or bytes are.
"""
