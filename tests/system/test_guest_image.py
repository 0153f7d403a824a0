"""What the guest's image must hold, seen from inside."""

from __future__ import annotations

from tests.support import Guest

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
