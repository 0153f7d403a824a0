"""What makes a guest its owner's own, in as little code as can be: a clone runs it before anything else.

Under TCG each piece of the kernel and the interpreter that runs for the first time has to be translated, some
seven microseconds for five instructions, and in a clone all that runs does so for the first time. So what can
be is open already.
"""

from __future__ import annotations

import mmap
import os

from google.protobuf.empty_pb2 import Empty

from kata_shim.guest import system
from kata_shim.protos import guest_pb2

_DIGITS = 32  # of a machine id, and a newline (machine-id(5))


class Identity:
    """The guest's random number generator and names. What it opens stays open."""

    def __init__(self) -> None:
        self._random = -1
        self._machine_id: mmap.mmap | None = None

    def claim(self, request: guest_pb2.ClaimRequest) -> Empty:
        """Take what an owner gives, randomness first."""
        if self._random < 0:
            self._open()
        system.mix_in(self._random, request.seed)
        system.set_hostname(request.name)
        if self._machine_id is not None:
            self._machine_id[:_DIGITS] = request.machine_id.encode()
        return Empty()

    def _open(self) -> None:
        self._random = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        if os.getpid() == 1:  # under another init, whose system it is, the machine id stays
            with open(system.MACHINE_ID, "w+b") as file:
                file.write(b"0" * _DIGITS + b"\n")
                file.flush()
                self._machine_id = mmap.mmap(file.fileno(), 0)
