"""Instead of pyroute2's network probes, which nothing here sends and which would bring OpenSSL along."""

from pyroute2.netlink import nlmsg


class probe_msg(nlmsg):  # noqa: N801  pyroute2's name
    __slots__ = ()
