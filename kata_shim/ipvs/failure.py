"""The kernel's error numbers in ipvsadm's words (ipvsadm 1.31). Pure."""

from __future__ import annotations

import errno
import os

from kata_shim.ipvs.command import Verb

_NO_SERVICE = "No such service"
_NO_SCHEDULER = "Scheduler or persistence engine not found"
_NOT_DEFINED = "Service not defined"
_NO_SERVER = "No such destination"
_OF_VERB = {
    (Verb.ADD_SERVICE, errno.EEXIST): "Service already exists",
    (Verb.ADD_SERVICE, errno.ENOENT): _NO_SCHEDULER,
    (Verb.EDIT_SERVICE, errno.ESRCH): _NO_SERVICE,
    (Verb.EDIT_SERVICE, errno.ENOENT): _NO_SCHEDULER,
    (Verb.DELETE_SERVICE, errno.ESRCH): _NO_SERVICE,
    (Verb.ZERO, errno.ESRCH): _NO_SERVICE,
    (Verb.LIST, errno.ESRCH): _NO_SERVICE,
    (Verb.ADD_SERVER, errno.ESRCH): _NOT_DEFINED,
    (Verb.ADD_SERVER, errno.EEXIST): "Destination already exists",
    (Verb.EDIT_SERVER, errno.ESRCH): _NOT_DEFINED,
    (Verb.EDIT_SERVER, errno.ENOENT): _NO_SERVER,
    (Verb.DELETE_SERVER, errno.ESRCH): _NOT_DEFINED,
    (Verb.DELETE_SERVER, errno.ENOENT): _NO_SERVER,
    (Verb.START_DAEMON, errno.EEXIST): "Daemon has already run",
    (Verb.STOP_DAEMON, errno.ESRCH): "No daemon is running",
}
_OF_ALL = {
    errno.EPERM: "Permission denied (you must be root)",
    errno.EINVAL: "Invalid operation.  Possibly wrong module version, address not unicast, ...",
    errno.ENOPROTOOPT: "Protocol not available",
    errno.ENOMEM: "Memory allocation problem",
    errno.EOPNOTSUPP: "Operation not supported with IPv6",
    errno.EAFNOSUPPORT: "Operation not supported with specified address family",
    errno.EMSGSIZE: "Module is wrong version",
}


def text(verb: Verb, number: int) -> str:
    """Return what ipvsadm says when the kernel answers `verb` with error `number`."""
    return _OF_VERB.get((verb, number)) or _OF_ALL.get(number) or os.strerror(number)
