"""How a value that somebody else wrote stands in an error message: on one line, quoted, short."""

from __future__ import annotations

LONGEST = 64


def quoted(value: object) -> str:
    """Return `value` as an error message shows it: strings in quotes, at most about 64 characters.

    Never raises and never returns a control character, whatever the value; arrays and objects are named, not
    shown, so that a hostile value costs nothing.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if value.bit_length() <= LONGEST else "a number beyond 64 bits"
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if isinstance(value, list | tuple):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    return _escaped(str(value)) if isinstance(value, float) else f"a {type(value).__name__}"


def _escaped(text: str) -> str:
    shown = ""
    for character in text:
        if character in '"\\':
            character = "\\" + character
        elif not character.isprintable():
            character = character.encode("unicode_escape").decode("ascii")
        if len(shown) + len(character) > LONGEST:
            return shown + "…"
        shown += character
    return shown
