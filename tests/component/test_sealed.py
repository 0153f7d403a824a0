"""The containers' runtime runs from memory that nobody can write to."""

from __future__ import annotations

import os
import subprocess

import pytest

from kata_shim.guest.sealed import seal

pytestmark = pytest.mark.quick


def test_cve_2019_5736_a_program_is_not_to_be_overwritten() -> None:
    """Neither by what runs from it, through /proc/self/exe, nor by whoever finds its descriptor."""
    program = seal("sh")
    script = "(: >/proc/$$/exe) && echo written; readlink /proc/$$/exe"
    ran = subprocess.run(
        [program.name, "-c", script], executable=program.path, capture_output=True, text=True
    )
    assert ran.stdout == "/memfd:sh (deleted)\n"
    with pytest.raises(PermissionError), open(program.path, "r+b", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(PermissionError):
        os.truncate(program.path, 0)


def test_one_that_is_not_there_is_told_when_it_is_run() -> None:
    assert seal("no-such-runtime") == ("no-such-runtime", "no-such-runtime")
