"""The command line: flags and words in any order. No argparse, whose import takes as long as a command."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class UsageError(Exception):
    """The command line itself is wrong; the message says what, the caller adds the command's usage."""


class HelpAsked(Exception):  # noqa: N818 - it is no error
    """-h or --help stands on the command line."""


class Arguments:
    """What a command was given: its words, the values of its flags, and the root of state."""

    def __init__(self, words: list[str], flags: dict[str, list[str]], root: str) -> None:
        self.words = words
        self.root = root
        self._flags = flags

    def has(self, flag: str) -> bool:
        """Tell whether the flag was given."""
        return flag in self._flags

    def last(self, flag: str) -> str:
        """Return the flag's value, the last one if it was repeated, "" if it was not given."""
        return self.all(flag)[-1] if self.has(flag) else ""

    def all(self, flag: str) -> list[str]:
        """Return every value of a flag, in their order."""
        return self._flags.get(flag, [])


def split(
    tokens: list[str], known: Mapping[str, bool], command_after: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words and the flags in `tokens`.

    `known` tells of each flag whether it takes a value, as `--flag VALUE` or `--flag=VALUE`. `--` ends the
    flags. With `command_after` > 0, all that follows that many words (and an optional `--`) is a command's
    own and is taken as it stands. Raises UsageError and HelpAsked.
    """
    words: list[str] = []
    flags: dict[str, list[str]] = {}
    literal = False
    position = 0
    while position < len(tokens):
        current = tokens[position]
        position += 1
        is_word = literal or current == "-" or not current.startswith("-")
        if current == "--" and not literal:
            literal = True
        elif not is_word:
            position = _read_flag(current, tokens, position, known, flags)
            continue
        if command_after and len(words) == command_after:
            return words + tokens[position - is_word :], flags
        if is_word:
            words.append(current)
            literal = literal and not command_after
    return words, flags


def _read_flag(
    flag: str, tokens: list[str], position: int, known: Mapping[str, bool], flags: dict[str, list[str]]
) -> int:
    name, equals, value = flag.partition("=")
    if name in ("-h", "--help"):
        raise HelpAsked
    if name not in known:
        raise UsageError(f"{name}: unknown flag")
    if not known[name]:
        if equals:
            raise UsageError(f"{name}: takes no value")
    elif not equals:
        if position == len(tokens):
            raise UsageError(f"{name}: needs a value")
        value = tokens[position]
        position += 1
    flags.setdefault(name, []).append(value)
    return position
