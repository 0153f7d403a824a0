"""The shim's command line: what it does not understand, and what goes wrong in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_shim import shim
from kata_shim.faces import factory

pytestmark = pytest.mark.quick

MISUSE = [
    [],
    ["serve"],
    ["serve", "--root", "/nonexistent", "--listen-fd", "3"],
    ["serve", "--root", "/nonexistent", "--listen-fd", "three", "a"],
    ["check", "--root", "/nonexistent", "a"],
    ["check"],
    ["zygote", "--root", "/nonexistent"],
    ["factory", "--root", "/nonexistent"],
    ["factory", "begin", "--root", "/nonexistent"],
    ["factory", "status"],
]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The shim sets its process's, which here is ours."""
    mask = os.umask(0o077)
    yield
    os.umask(mask)


@pytest.mark.parametrize("arguments", MISUSE, ids=" ".join)
def test_misuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shim.main(arguments) == 2
    assert capsys.readouterr() == ("", shim.USAGE)


def test_an_id_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert shim.main(["serve", "--root", "/nonexistent", "--listen-fd", "3", "a/b"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.startswith("containerd-shim-kata-v2: ")) == ("", True)
    assert "a/b" in err


@pytest.mark.parametrize("defect", [KeyError, ValueError])
def test_a_defect_is_not_taken_for_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: type[Exception]
) -> None:
    """Of what runs for hours, the traceback is all that is left of it."""

    def fail(*_: object) -> int:
        raise defect("defect")

    monkeypatch.setitem(factory.COMMANDS, "status", fail)
    with pytest.raises(defect, match="defect"):
        shim.main(["factory", "status", "--root", str(tmp_path)])
