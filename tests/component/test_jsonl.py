"""The JSON-lines server on a real socket, with handlers that do as they are told and clients that do not."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from kata_shim.errors import ShimError
from kata_shim.faces.jsonl import MAX_IN_FLIGHT, MAX_STDIN, Call, Server
from kata_shim.memory import remember
from kata_shim.messages import MAX_LINE
from tests.wire import PATIENCE, Wire

pytestmark = pytest.mark.quick

BLOCK = "x" * 65536
# What two kernel socket buffers and the transport's own hold of such lines, generously.
BUFFERED = 64


class Served:
    """A server with handlers that wait at a gate, and what they have seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gate = asyncio.Event()
        self.undo = asyncio.Event()
        self.seen: Counter[str] = Counter()
        self.changed = asyncio.Condition()
        self.stdin: list[bytes | None] = []
        self.server = Server(
            {
                name: getattr(self, name)
                for name in ("echo", "wait", "flood", "read", "fail", "undoable", "unwritable")
            }
        )

    async def see(self, what: str) -> None:
        """Note that something has happened."""
        async with self.changed:
            self.seen[what] += 1
            self.changed.notify_all()

    async def until(self, what: str, count: int = 1) -> None:
        """Wait until something has happened so often."""
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(lambda: self.seen[what] >= count)

    async def echo(self, call: Call) -> object:
        await self.see("echo")
        return call.params

    async def wait(self, call: Call) -> object:
        await self.see("wait")
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.see("cancelled")
            raise
        return call.params

    async def undoable(self, call: Call) -> object:
        await self.see("undoable")
        try:
            await self.gate.wait()
        finally:
            await self.see("undoing")
            await self.undo.wait()
            await self.see("undone")
        return call.params

    async def flood(self, call: Call) -> object:
        assert isinstance(call.params, int)
        for number in range(call.params):
            await call.progress([number, BLOCK])
            await self.see("flood")
        return "end"

    async def read(self, call: Call) -> object:
        await self.see("read")
        await self.gate.wait()
        while (data := await call.read_stdin()) is not None:
            self.stdin.append(data)
        return len(self.stdin)

    async def fail(self, call: Call) -> object:
        call.warnings.append("a warning")
        if call.params == "defect":
            raise ValueError("of a sort that nobody has thought of")
        raise ShimError("not-found", "nothing there", result={"what": "stays"})

    async def unwritable(self, call: Call) -> object:
        return BLOCK * 80 if call.params == "long" else {1, 2}


@pytest_asyncio.fixture
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server that listens; anybody may connect."""
    directory = tmp_path_factory.mktemp("jsonl")
    directory.chmod(0o755)
    served = Served(directory / "shim.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(served.path))
    served.path.chmod(0o666)
    listener.listen(128)
    await served.server.listen(listener)
    yield served
    served.gate.set()
    served.undo.set()
    await asyncio.wait_for(served.server.close(), PATIENCE)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest_asyncio.fixture
async def wire(served: Served) -> AsyncIterator[Wire]:
    """A client of it."""
    async with await Wire.connect(served.path) as connected:
        yield connected


async def test_more_requests_at_once_than_run_at_once_are_all_answered(wire: Wire) -> None:
    count = 3 * MAX_IN_FLIGHT
    wire.send(*({"id": f"r{n}", "method": "echo", "params": [n]} for n in range(count)))
    answers = await wire.answers(*(f"r{n}" for n in range(count)))
    assert answers == {f"r{n}": {"id": f"r{n}", "result": [n]} for n in range(count)}


async def test_no_more_run_at_once_than_the_limit(served: Served, wire: Wire) -> None:
    wire.send(*({"id": n, "method": "wait"} for n in range(MAX_IN_FLIGHT + 10)))
    await served.until("wait", MAX_IN_FLIGHT)
    async with await Wire.connect(served.path) as other:
        for _ in range(20):
            await other.call("echo")
    assert served.seen["wait"] == MAX_IN_FLIGHT
    served.gate.set()
    await wire.answers(*range(MAX_IN_FLIGHT + 10))
    assert served.seen["wait"] == MAX_IN_FLIGHT + 10


async def test_answers_come_as_they_finish(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "wait", "params": "slow"}, {"id": 2, "method": "echo"})
    assert await wire.line() == b'{"id":2,"result":null}\n'
    served.gate.set()
    assert await wire.line() == b'{"id":1,"result":"slow"}\n'


async def test_progress_comes_in_order_and_before_the_end(wire: Wire) -> None:
    request = wire.request("flood", 3)
    lines = [await wire.line() for _ in range(4)]
    assert lines == [
        *(f'{{"id":"{request}","progress":[{n},"{BLOCK}"]}}\n'.encode() for n in range(3)),
        f'{{"id":"{request}","result":"end"}}\n'.encode(),
    ]


async def test_what_a_large_request_took_is_given_back(wire: Wire) -> None:
    """Small ones are not worth the time that takes."""
    remembered = remember(1)(str.upper)
    for params, kept in (("small", 1), (BLOCK * 2, 0)):
        remembered("x")
        await wire.call("echo", params)
        await wire.call("echo")
        assert remembered.cache_info().currsize == kept


async def test_an_error_carries_its_attributes_and_warnings(wire: Wire) -> None:
    wire.send({"id": "a", "method": "fail"})
    assert await wire.line() == (
        b'{"id":"a","warnings":["a warning"],"error":'
        b'{"code":"not-found","message":"nothing there","result":{"what":"stays"}}}\n'
    )


async def test_a_defect_of_a_handler_is_an_error_of_its_request_alone(wire: Wire) -> None:
    answer = await wire.call("fail", "defect")
    assert answer["error"]["code"] == "internal"
    assert "ValueError: of a sort that nobody has thought of" in answer["error"]["message"]
    assert (await wire.call("unwritable"))["error"]["code"] == "internal"
    assert (await wire.call("unwritable", "long"))["error"]["code"] == "resource-exhausted"
    assert (await wire.call("echo", 1))["result"] == 1


async def test_an_unknown_method(wire: Wire) -> None:
    answer = await wire.call("sandbox.dance")
    assert answer["error"] == {"code": "unimplemented", "message": "method: 'sandbox.dance' is unknown"}


async def test_cancel_answers_once_and_after_the_undoing(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "undoable"})
    await served.until("undoable")
    wire.cancel(1)
    await served.until("undoing")
    for _ in range(3):  # what undoes is not interrupted
        wire.cancel(1)
    assert (await wire.call("echo"))["result"] is None
    assert served.seen["undone"] == 0
    served.undo.set()
    message = {"code": "cancelled", "message": "the request was cancelled"}
    assert await wire.answers(1) == {1: {"id": 1, "error": message}}
    assert served.seen["undone"] == 1
    wire.cancel(1)  # it has ended: no answer, no harm
    wire.cancel("nobody")
    assert (await wire.call("echo", 2))["result"] == 2


async def test_a_cancel_right_behind_its_request(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "wait"}, {"id": 1, "cancel": True}, {"id": 2, "method": "echo"})
    answers = await wire.answers(1, 2)
    assert answers[1]["error"]["code"] == "cancelled"
    assert served.seen["wait"] == served.seen["cancelled"]
    wire.send({"id": 1, "method": "echo", "params": "again"})
    assert (await wire.answers(1))[1]["result"] == "again"


async def test_stdin_is_let_in_as_it_is_taken(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "read"})
    for number in range(MAX_STDIN):
        wire.stdin(1, b"%d" % number)
    await served.until("read")
    assert (await wire.call("echo"))["result"] is None
    assert served.stdin == []
    served.gate.set()
    for _ in range(MAX_STDIN):
        assert await wire.line() == b'{"id":1,"progress":{"stdin":1}}\n'
    wire.stdin(1, b"last")
    wire.stdin(1, None)
    assert (await wire.answers(1))[1]["result"] == MAX_STDIN + 1
    assert served.stdin == [*(b"%d" % number for number in range(MAX_STDIN)), b"last"]
    wire.stdin(1, b"too late")
    assert (await wire.call("echo", 3))["result"] == 3


async def test_more_stdin_than_was_let_in_ends_the_request(wire: Wire) -> None:
    wire.send({"id": 1, "method": "read"}, *({"id": 1, "stdin": "eA=="} for _ in range(MAX_STDIN + 1)))
    error = (await wire.answers(1))[1]["error"]
    assert error == {
        "code": "resource-exhausted",
        "message": f"stdin: more than {MAX_STDIN} lines that were not taken yet",
    }
    assert (await wire.call("echo", 4))["result"] == 4


async def test_a_cancel_passes_a_full_stdin(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "read"}, *({"id": 1, "stdin": "eA=="} for _ in range(MAX_STDIN)))
    await served.until("read")
    wire.cancel(1)
    assert (await wire.answers(1))[1]["error"]["code"] == "cancelled"


GARBAGE: list[tuple[bytes, object, str]] = [
    (b"\n", None, "line: not JSON"),
    (b"\xff\xfe\n", None, "line: not JSON"),
    (b"{\n", None, "line: not JSON"),
    (b"[" * 5000 + b"\n", None, "line: not JSON"),
    (b"[]\n", None, "line: an array is not an object"),
    (b"{}\n", None, "id: null is not an integer or a string"),
    (b'{"id":1.5,"method":"echo"}\n', None, "id: a number is not an integer or a string"),
    (b'{"id":7}\n', 7, "line: exactly one of method, cancel, stdin and resize is needed"),
    (b'{"id":7,"method":"echo","cancel":true}\n', 7, "line: exactly one of method, cancel, stdin and resize"),
    (b'{"id":7,"method":3}\n', 7, "method: an integer is not a string"),
    (b'{"id":7,"method":"echo","parms":{}}\n', 7, "'parms': unknown key beside method"),
    (b'{"id":7,"cancel":false}\n', 7, "cancel: false is not true"),
    (b'{"id":7,"stdin":"?"}\n', 7, "stdin: not base64"),
]


@pytest.mark.parametrize(("line", "answered", "message"), GARBAGE)
async def test_garbage_is_refused_and_the_next_line_is_taken(
    wire: Wire, line: bytes, answered: object, message: str
) -> None:
    wire.writer.write(line)
    answer = await wire.receive()
    assert answer["id"] == answered
    assert answer["error"]["code"] == "invalid-argument"
    assert answer["error"]["message"].startswith(message)
    assert (await wire.call("echo", "next"))["result"] == "next"


@pytest.mark.parametrize(
    "line",
    [b'{"id":1,"method":"echo"}\n', b'{"id":1,"cancel":0}\n', b'{"id":1,"stdin":"?"}\n', b'{"id":1}\n'],
)
async def test_a_refused_line_does_not_end_the_request_in_flight(
    served: Served, wire: Wire, line: bytes
) -> None:
    wire.send({"id": 1, "method": "wait", "params": "mine"})
    await served.until("wait")
    wire.writer.write(line)
    refusal = await wire.receive()
    assert refusal["id"] is None
    assert refusal["error"]["code"] == "invalid-argument"
    served.gate.set()
    assert await wire.receive() == {"id": 1, "result": "mine"}


async def test_the_longest_line_is_taken(wire: Wire) -> None:
    empty = len(orjson.dumps({"id": 1, "method": "wait", "params": ""})) + 1
    wire.send({"id": 1, "method": "none", "params": "x" * (MAX_LINE - empty)})
    assert (await wire.answers(1))[1]["error"]["code"] == "unimplemented"


@pytest.mark.parametrize("end", [b"\n", b""], ids=["with its newline", "without"])
async def test_a_longer_line_ends_the_connection(served: Served, wire: Wire, end: bytes) -> None:
    wire.send({"id": 1, "method": "wait"})
    await served.until("wait")
    wire.writer.write(b"x" * (MAX_LINE + 1 - len(end)) + end)
    answers = [await wire.receive(), await wire.receive()]
    assert answers[0] == {
        "id": None,
        "error": {"code": "invalid-argument", "message": f"line: more than {MAX_LINE} bytes"},
    }
    assert answers[1]["error"]["code"] == "cancelled"
    assert await wire.line() == b""


async def test_half_a_line_is_no_request(served: Served, wire: Wire) -> None:
    wire.writer.write(b'{"id":1,"method":"echo"}')
    wire.writer.write_eof()
    assert await wire.line() == b""
    assert served.seen["echo"] == 0


async def test_a_stranger_is_refused(served: Served) -> None:
    nobody = 65534
    program = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('shim.sock');"
        """s.sendall(b'{"id":1,"method":"echo"}\\n'); print(s.recv(99))"""
    )
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/python3",  # nobody may not be able to reach the virtual environment
        "-ISc",
        program,
        cwd=served.path.parent,  # entered as root: the way there is closed to nobody
        user=nobody,
        group=nobody,
        extra_groups=[],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert output in (b"b''\n", b"") or b"Connection reset" in output or b"Broken pipe" in output, output
    assert served.seen["echo"] == 0
    async with await Wire.connect(served.path) as wire:
        assert (await wire.call("echo", os.getuid()))["result"] == os.getuid()


async def test_a_client_that_goes_cancels_what_it_asked_for(served: Served) -> None:
    async with await Wire.connect(served.path) as kept, await Wire.connect(served.path) as wire:
        kept.send({"id": 1, "method": "wait", "params": "kept"})
        wire.send({"id": 1, "method": "wait"}, {"id": 2, "method": "undoable"})
        await served.until("wait", 2)
        await served.until("undoable")
        await wire.close()
        await served.until("cancelled")
        await served.until("undoing")
        served.undo.set()
        await served.until("undone")
        served.gate.set()
        assert await kept.receive() == {"id": 1, "result": "kept"}


async def test_a_client_that_goes_with_more_asked_for_than_runs(served: Served) -> None:
    wire = await Wire.connect(served.path)
    wire.send(*({"id": n, "method": "wait"} for n in range(MAX_IN_FLIGHT + 1)))
    await served.until("wait", MAX_IN_FLIGHT)
    await wire.close()
    await served.until("cancelled", MAX_IN_FLIGHT)


async def test_a_client_that_does_not_read_holds_its_requests_back(served: Served) -> None:
    async with await Wire.connect(served.path) as slow, await Wire.connect(served.path) as other:
        slow.reader._limit = 1  # type: ignore[attr-defined]  # asyncio stops reading for it
        request = slow.request("flood", 1000)
        await served.until("flood", 2)
        for _ in range(100):
            await other.call("echo")
        assert served.seen["flood"] < BUFFERED
        slow.reader._limit = 2 * MAX_LINE  # type: ignore[attr-defined]
        for number in range(1000):
            assert (await slow.receive())["progress"][0] == number
        assert await slow.receive() == {"id": request, "result": "end"}


async def test_a_client_that_asks_and_does_not_read_is_no_longer_heard(served: Served) -> None:
    """Answers that cannot go out count as requests in flight: nobody can pile them up in our memory."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(served.path))
    request: dict[str, Any] = {"id": 1, "method": "echo", "params": BLOCK[:8192]}
    asking = asyncio.create_task(_ask_for_ever(sock, request))
    await served.until("echo", MAX_IN_FLIGHT)
    async with await Wire.connect(served.path) as other:
        for _ in range(200):
            await other.call("echo")
    assert served.seen["echo"] < MAX_IN_FLIGHT + BUFFERED * 8 + 200
    asking.cancel()
    await asyncio.wait([asking])
    sock.close()


async def _ask_for_ever(sock: socket.socket, request: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    number = 0
    while True:
        number += 1
        await loop.sock_sendall(sock, orjson.dumps({**request, "id": number}) + b"\n")


async def test_closing_does_not_wait_for_a_client_that_does_not_read(served: Served) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(served.path))
    sock.sendall(b'{"id":1,"method":"flood","params":1000}\n')
    await served.until("flood", 2)
    async with asyncio.timeout(10):
        await served.server.close()
    sock.close()


async def test_finishing_lets_the_answers_out_that_are_due(served: Served, wire: Wire) -> None:
    wire.send({"id": 1, "method": "wait", "params": "due"})
    await served.until("wait")
    finishing = asyncio.create_task(served.server.finish())
    await asyncio.sleep(0)
    served.gate.set()
    assert await wire.receive() == {"id": 1, "result": "due"}
    await finishing
    await served.server.close()
    assert await wire.line() == b""
