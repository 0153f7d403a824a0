"""(e) The first call after the shim's death: it starts a shim, which takes the sandbox over, and answers."""

from __future__ import annotations

from bench.cases import Comparison, nic
from bench.place import CLI
from bench.stand import SANDBOX, Stand


def reattach(stand: Stand, rounds: int) -> list[Comparison]:
    """(e) CLI calls that find the shim dead, against the same calls that find it alive."""
    listing = Comparison("(e) `list-ifaces` after the shim was killed", "with the shim alive", "≤ 1 s")
    state = Comparison("(e) `state` after the shim was killed", "with the shim alive", "≤ 1 s")
    given = nic(0)
    stand.cli(*stand.network("add-iface", stand.document(given))[1:])
    for _ in range(rounds):
        for compared, command in (
            (listing, stand.network("list-ifaces")),
            (state, [CLI, "state", SANDBOX]),
        ):
            stand.kill_shim()
            compared.measured.append(stand.time(command))
            compared.basis.append(stand.time(command))
    stand.cli(*stand.network("del-iface", stand.document(given))[1:])
    return [listing, state]
