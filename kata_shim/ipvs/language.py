"""ipvsadm's command lines (ipvsadm 1.31), read into commands, with its own messages and exit statuses. Pure.

What a line means may depend on the order of its options, as in ipvsadm: `-6` is refused before `-f`, and a
server without a port has that of the service named before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kata_shim.ipvs.command import STATUS_FAILED, Command, UsageError, Verb
from kata_shim.ipvs.draft import Draft
from kata_shim.ipvs.names import NUMERIC, Names
from kata_shim.ipvs.options import NEEDED, NONE, OPTIONAL, Given, Option, OptionError, Table

_Action = Callable[[Draft, Given], None]

_VERBS: dict[Option, Verb] = {
    Option("add-service", "A", NONE): Verb.ADD_SERVICE,
    Option("edit-service", "E", NONE): Verb.EDIT_SERVICE,
    Option("delete-service", "D", NONE): Verb.DELETE_SERVICE,
    Option("clear", "C", NONE): Verb.CLEAR,
    Option("list", "L", NONE): Verb.LIST,
    Option("list", "l", NONE): Verb.LIST,
    Option("zero", "Z", NONE): Verb.ZERO,
    Option("add-server", "a", NONE): Verb.ADD_SERVER,
    Option("edit-server", "e", NONE): Verb.EDIT_SERVER,
    Option("delete-server", "d", NONE): Verb.DELETE_SERVER,
    Option("set", "", NONE): Verb.SET,
    Option("help", "h", NONE): Verb.HELP,
    Option("version", "v", NONE): Verb.VERSION,
    Option("restore", "R", NONE): Verb.RESTORE,
    Option("save", "S", NONE): Verb.SAVE,
    Option("start-daemon", "", NEEDED): Verb.START_DAEMON,
    Option("stop-daemon", "", NEEDED): Verb.STOP_DAEMON,
}
_VIEWS = (
    Option("numeric", "n", NONE),
    Option("connection", "c", NONE),
    Option("exact", "X", NONE),
    *(
        Option(name, "", NONE)
        for name in (
            "timeout", "daemon", "stats", "rate", "thresholds", "persistent-conn", "nosort", "tun-info"
        )
    ),
)  # fmt: skip
_NUMBERS = (
    Option("weight", "w", NEEDED),
    Option("u-threshold", "x", NEEDED),
    Option("l-threshold", "y", NEEDED),
    *(Option(name, "", NEEDED) for name in ("syncid", "sync-maxlen", "mcast-port", "mcast-ttl", "tun-port")),
)
_ACTIONS: dict[Option, _Action] = {
    **dict.fromkeys(_VERBS, Draft.misplaced),
    **dict.fromkeys(_VIEWS, Draft.view),
    **dict.fromkeys(_NUMBERS, Draft.number),
    Option("tcp-service", "t", NEEDED): Draft.address,
    Option("udp-service", "u", NEEDED): Draft.address,
    Option("sctp-service", "", NEEDED): Draft.address,
    Option("fwmark-service", "f", NEEDED): Draft.fwmark,
    Option("ipv6", "6", NONE): Draft.ipv6,
    Option("scheduler", "s", NEEDED): Draft.scheduler,
    Option("persistent", "p", OPTIONAL): Draft.persistent,
    Option("netmask", "M", NEEDED): Draft.netmask,
    Option("pe", "", NEEDED): Draft.engine,
    Option("sched-flags", "b", NEEDED): Draft.sched_flags,
    Option("ops", "o", NONE): Draft.one_packet,
    Option("real-server", "r", NEEDED): Draft.real_server,
    Option("mcast-interface", "", NEEDED): Draft.interface,
    Option("mcast-group", "", NEEDED): Draft.group,
    Option("masquerading", "m", NONE): Draft.forward,
    Option("ipip", "i", NONE): Draft.forward,
    Option("gatewaying", "g", NONE): Draft.forward,
    Option("tun-nocsum", "", NONE): Draft.tunnel_flag,
    Option("tun-csum", "", NONE): Draft.tunnel_flag,
    Option("tun-remcsum", "", NONE): Draft.tunnel_flag,
    Option("tun-type", "", NEEDED): Draft.tunnel_type,
    Option("sort", "", NONE): Draft.nothing,
}
_OPTIONS = Table(_ACTIONS)


def parse(words: Sequence[str], names: Names = NUMERIC) -> Command:
    """Return the command of one line, the program's name left out.

    No words at all are a list. Raises UsageError with ipvsadm's own text and status. Guarantees no other
    exception for any words.
    """
    if not words:
        return Command(Verb.LIST)
    rest: list[str] = []
    options = _OPTIONS.read(list(words), rest)
    try:
        first = next(options, None)
    except OptionError:
        first = None
    if first is None or first.option not in _VERBS:
        raise UsageError("Try `ipvsadm -h' or 'ipvsadm --help' for more information.", STATUS_FAILED)
    draft = Draft(_VERBS[first.option], names)
    if draft.verb in (Verb.HELP, Verb.VERSION):
        return Command(draft.verb)
    draft.begin(first)
    try:
        for given in options:
            _ACTIONS[given.option](draft, given)
    except OptionError as error:
        word, text = error.args
        raise UsageError(f"{word}: {text}", STATUS_FAILED) from None
    return draft.finish(rest)
