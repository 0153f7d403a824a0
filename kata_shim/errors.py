"""The one error type that crosses rooms, and the list of its codes."""

from __future__ import annotations

# gRPC status codes (grpc/status.proto), by the names that stand on the JSON-lines wire: ttrpc carries the
# number, JSON lines the name, so neither face needs a table of its own.
CODES: dict[str, int] = {
    "cancelled": 1,
    "unknown": 2,
    "invalid-argument": 3,
    "deadline-exceeded": 4,
    "not-found": 5,
    "already-exists": 6,
    "permission-denied": 7,
    "resource-exhausted": 8,
    "failed-precondition": 9,
    "aborted": 10,
    "unimplemented": 12,
    "internal": 13,
    "unavailable": 14,
    "data-loss": 15,
}
NAMES: dict[int, str] = {number: name for name, number in CODES.items()}


class ShimError(Exception):
    """A failure a caller can act on.

    `code` is a key of CODES; `message` says what was wrong, where, which rule it broke and what to do;
    `attrs` are JSON values that travel beside it (`result`: what goes to stdout in spite of the failure).
    """

    def __init__(self, code: str, message: str, **attrs: object) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.attrs = attrs

    def to_json(self) -> dict[str, object]:
        """Return the error as it stands on the JSON-lines wire: `{"code","message",…attrs}`."""
        return {"code": self.code, "message": self.message, **self.attrs}

    @property
    def status(self) -> int:
        """The gRPC status number that ttrpc carries."""
        return CODES[self.code]


def invalid(message: str, **attrs: object) -> ShimError:
    """Return an `invalid-argument` error: the caller's input broke a rule."""
    return ShimError("invalid-argument", message, **attrs)
