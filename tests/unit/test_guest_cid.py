"""The guest's vsock context id: any sandbox's uuid gives one that may be used, and always the same one."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.vm.spec import guest_cid

pytestmark = pytest.mark.quick

LEAST, MOST = 3, 2**32 - 2  # 0, 1, 2 and 2^32-1 have meanings of their own: vsock(7)


@pytest.mark.parametrize(
    ("number", "cid"),
    [
        (0, LEAST),
        (MOST - LEAST, MOST),
        (MOST - LEAST + 1, LEAST),
        (2**128 - 1, LEAST + (2**128 - 1) % (MOST - LEAST + 1)),
    ],
)
def test_range(number: int, cid: int) -> None:
    assert guest_cid(str(UUID(int=number))) == cid


@given(st.uuids())
def test_any_uuid(uuid: UUID) -> None:
    assert LEAST <= guest_cid(str(uuid)) <= MOST
