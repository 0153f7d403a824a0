"""Which command a sandbox takes in which state: one table, read by everything that asks.

    creating ──► running ──► stopped ──► (gone)
        │           └───────────────────────▲
        └── a failed start removes what it made; nothing is left to be in a state

A sandbox is `creating` until its agent has answered, `running` while QEMU lives, `stopped` once QEMU has
ended (by itself, by a signal, by the guest) and until `delete` clears its directory, `deleting` in between.
"""

from __future__ import annotations

from kata_shim.errors import ShimError

STATES = ("creating", "running", "stopped", "deleting")

_ALLOWED: dict[str, frozenset[str]] = {
    "start": frozenset({"creating"}),
    "exec": frozenset({"running"}),
    "network": frozenset({"running"}),
    "ipvs": frozenset({"running"}),
    "delete": frozenset(STATES),
}


class Lifecycle:
    """The state of one sandbox, and why it stopped."""

    def __init__(self, sandbox_id: str) -> None:
        self.sandbox_id = sandbox_id
        self.state = "creating"
        self.cause = ""

    def require(self, command: str) -> None:
        """Return if the state allows `command`; raises ShimError `failed-precondition` that says why not."""
        if self.state in _ALLOWED[command]:
            return
        because = f": {self.cause}" if self.cause else ""
        raise ShimError(
            "failed-precondition", f"sandbox {self.sandbox_id} is {self.state}{because}", state=self.state
        )

    def stop(self, cause: str) -> None:
        """Enter `stopped`; the first cause given stays."""
        if self.state in ("creating", "running"):
            self.state = "stopped"
            self.cause = self.cause or cause
