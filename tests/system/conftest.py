"""What the system tests share: one sandbox for all that need no special one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Guest, Runtime
from tests.system.network import agree, booted, cleared, held_files


@pytest.fixture(scope="session")
def shared_guest(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A q35 sandbox with one CPU, 25 slots and memory that a vhost-user back end could share."""
    with booted(runtime, tmp_path_factory.mktemp("shared"), "shared-guest", shared_memory=True) as guest:
        cleared(guest)
        yield guest


@pytest.fixture
def nics(shared_guest: Guest) -> Iterator[Guest]:
    """The shared sandbox without NICs; in the end all parts must agree on those that there are then."""
    files = held_files(shared_guest)
    yield shared_guest
    try:
        agree(shared_guest)
    finally:
        cleared(shared_guest)
    assert held_files(shared_guest) == files


@pytest.fixture
def ipvs_guest(shared_guest: Guest) -> Iterator[Guest]:
    """The shared sandbox with an empty table, and its timeouts as they were."""
    yield shared_guest
    for command in ("-C", "--set 900 120 300"):
        assert shared_guest.run("ipvsadm", *command.split()).status == 0
