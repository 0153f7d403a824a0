"""Command lines as popt(3) reads them, and so ipvsadm: bundles, `=`, arguments that may lack. Pure."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

NONE = 0
NEEDED = 1
OPTIONAL = 2


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """An option of a table; `argument` is NONE, NEEDED or OPTIONAL, `short` a letter or ""."""

    name: str
    short: str
    argument: int


class Given(NamedTuple):
    """An option as it was given; `word` is the last one read for it, `argument` None where it has none."""

    option: Option
    argument: str | None
    word: str


class OptionError(Exception):
    """A word that is no option of the table's: its arguments are the word, and popt's text for it."""


class Table:
    """The options a command line may have."""

    def __init__(self, options: Iterable[Option]) -> None:
        self._short: Mapping[str, Option] = {option.short: option for option in options if option.short}
        self._long: Mapping[str, Option] = {option.name: option for option in options}
        # What most words are, found at once: `-t`, `--tcp-service`.
        self._whole = {f"-{letter}": option for letter, option in self._short.items()}
        self._whole |= {f"--{name}": option for name, option in self._long.items()}

    def read(self, words: list[str], rest: list[str]) -> Iterator[Given]:
        """Yield the options in their order; whatever is none is put on `rest`. Raises OptionError."""
        at = 0
        while at < len(words):
            word = words[at]
            at += 1
            option = self._whole.get(word)
            if option is not None:
                argument = None
                if option.argument and self._takes_next(option, words, at, word):
                    argument = words[at]
                    at += 1
                yield Given(option, argument, words[at - 1])
            elif word == "--":
                rest += words[at:]
                return
            elif word.startswith("--"):
                yield self._long_with_argument(word)
            elif word.startswith("-") and word != "-":
                at = yield from self._bundle(word, words, at)
            else:
                rest.append(word)

    @staticmethod
    def _takes_next(option: Option, words: list[str], at: int, word: str) -> bool:
        """Whether the next word is the option's argument."""
        if at == len(words):
            if option.argument == NEEDED:
                raise OptionError(word, "missing argument")
            return False
        return option.argument == NEEDED or not words[at].startswith("-")

    def _long_with_argument(self, word: str) -> Given:
        name, equals, argument = word[2:].partition("=")
        option = self._long.get(name)
        if option is None:
            raise OptionError(word, "unknown option")
        if option.argument == NONE:
            raise OptionError(word, "option does not take an argument")
        assert equals  # else it had been found whole
        return Given(option, argument, word)

    def _bundle(self, word: str, words: list[str], at: int) -> Generator[Given, None, int]:
        """Read letters behind one dash; the last may have an argument. Return the next word's place."""
        for place, letter in enumerate(word[1:], 2):
            option = self._short.get(letter)
            if option is None:
                raise OptionError(word, "unknown option")
            behind = word[place:]
            if option.argument == NONE:
                if behind.startswith("="):
                    raise OptionError(word, "option does not take an argument")
                yield Given(option, None, word)
                continue
            argument: str | None = behind.removeprefix("=")
            if not behind:
                argument = None
                if self._takes_next(option, words, at, word):
                    argument = words[at]
                    at += 1
            yield Given(option, argument, words[at - 1])
            break
        return at
