"""What answers at vm_cache_endpoint is no factory, or offers no VM: a sandbox is cloned all the same."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.factory import configure, delete, run
from tests.support import Runtime

STRANGE = {
    "nothing": b"",
    "no JSON": b"220 mail.example ESMTP\n",
    "no object": b"[]\n",
    "no answer": b'{"id":1}\n',
    "no offer": b'{"id":1,"progress":null}\n',
    "half a line": b'{"id":1,"progress":{"uuid"',
    "too long": b'{"id":1,"progress":"' + b"x" * 100_000 + b'"}\n',
    "no code": b'{"id":1,"error":{"code":"nonsense","message":"?"}}\n',
    "no error": b'{"id":1,"error":"no"}\n',
}


@pytest.fixture(scope="module")
def own(root: Path) -> Iterator[Runtime]:
    """The CLI with a cache of one VM, on a root of its own."""
    path = root / "strange"
    (path / "run").mkdir(0o700, parents=True)
    yield Runtime(path / "root", configure(path / "one.toml", path))
    shutil.rmtree(path)


@contextmanager
def answering(own: Runtime, answer: bytes) -> Iterator[None]:
    """Give one caller this answer, whatever it asks."""
    endpoint = own.root.parent / "run/cache.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(endpoint))
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, answer))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RD)  # should nobody have come
            thread.join()
            endpoint.unlink()


def _serve(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(answer)


@pytest.mark.parametrize("kind", STRANGE)
def test_answers_outside_the_protocol(own: Runtime, kind: str) -> None:
    with answering(own, STRANGE[kind]):
        assert run(own, "a") == "template"
    delete(own, "a")


@pytest.mark.parametrize("there", [False, True])
def test_an_offer_of_what_is_not_there(own: Runtime, there: bool) -> None:
    """Neither a directory, nor, if there is one, a QEMU."""
    vm = own.root.parent / "vm"
    offer = {"directory": str(vm), "uuid": "0" * 32, "pid": 2**22 + 1, "start_time": 1}
    if there:
        vm.mkdir()
        (vm / "qemu.log").touch()
    with answering(own, json.dumps({"id": 1, "progress": offer}).encode() + b"\n"):
        assert run(own, "a") == "template"
    assert not vm.exists()
    delete(own, "a")
