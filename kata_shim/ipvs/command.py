"""One line of ipvsadm's language, as what it means. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from kata_shim.ipvs.rules import Daemon, Server, Service, Timeouts

STATUS_USAGE = 2
STATUS_FAILED = 255  # -1 as a process's status


class Verb(StrEnum):
    """What a line does; the text is ipvsadm's name for it in messages."""

    ADD_SERVICE = "add-service"
    EDIT_SERVICE = "edit-service"
    DELETE_SERVICE = "delete-service"
    CLEAR = "flush"
    LIST = "list"
    ADD_SERVER = "add-server"
    DELETE_SERVER = "delete-server"
    EDIT_SERVER = "edit-server"
    SET = "set"
    START_DAEMON = "start-daemon"
    STOP_DAEMON = "stop-daemon"
    RESTORE = "restore"
    SAVE = "save"
    ZERO = "zero"
    HELP = "help"
    VERSION = "version"


class Command(NamedTuple):
    """One line. `service`, `server`, `timeouts` and `daemon` are there where the verb has them.

    `given` are the names of the options besides the verb, in ipvsadm's words for them ("service-address",
    "forwarding-method", "numeric"); the views of a list are in it. `service` of `zero` is None for all.
    """

    verb: Verb
    service: Service | None = None
    server: Server | None = None
    timeouts: Timeouts | None = None
    daemon: Daemon | None = None
    given: frozenset[str] = frozenset()


class UsageError(Exception):
    """A line that is refused: `text` is what ipvsadm prints on stderr, `status` how it exits."""

    def __init__(self, text: str, status: int = STATUS_USAGE) -> None:
        super().__init__(text)
        self.text = text
        self.status = status
