"""What the guest's image must hold, and its kernel be told, seen from inside."""

from __future__ import annotations

from tests.support import Guest, Result

PROTOBUF = """
import sys
sys.path.append("/usr/lib/python3/dist-packages")
from google.protobuf.internal import api_implementation
print(api_implementation.Type())
"""


def test_protobuf_is_the_one_in_c(shared_guest: Guest) -> None:
    # Where its library is missing it falls back to Python without a word, and every call takes longer.
    done = shared_guest.run("python3", "-c", PROTOBUF)
    assert (done.status, done.stdout, done.stderr) == (0, "upb\n", "")


def test_huge_pages_are_for_who_asks(shared_guest: Guest) -> None:
    # A small heap that has one unasked costs each clone all of it.
    enabled = shared_guest.run("cat", "/sys/kernel/mm/transparent_hugepage/enabled")
    assert enabled == Result(0, "always [madvise] never\n", "")
