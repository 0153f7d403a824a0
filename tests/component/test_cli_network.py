"""kata-runtime kata-network, the real process against a shim's end that misbehaves: every byte and status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from kata_shim import messages
from kata_shim.errors import ShimError
from kata_shim.messages import Cancel, Request
from tests.component.cli_peer import CLI, Message, cli, environment, peer, sends
from tests.support import Call

pytestmark = pytest.mark.quick

ID = "6ec7a98d"
READING = ["add-iface", "update-iface", "del-iface", "add-route", "del-route", "update-routes"]
LISTING = ["list-ifaces", "list-routes"]
LISTED = [{"name": "eth-test", "mac": "02:42:20:6f:a3:69", "ip": ["172.16.0.3/16"], "mtu": 1500}]
LISTED_TEXT = b'[{"name":"eth-test","mac":"02:42:20:6f:a3:69","ip":["172.16.0.3/16"],"mtu":1500}]\n'


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A root of state with one sandbox in which no shim runs yet."""
    root = tmp_path / "root"
    (root / "sandboxes" / ID).mkdir(parents=True)
    root.chmod(0o700)
    return root


@pytest.mark.parametrize("command", LISTING)
def test_listing_prints_the_result(state: Path, command: str) -> None:
    with peer(state, ID, sends(messages.result(1, LISTED))) as shim:
        assert cli(state, "kata-network", command, ID) == (0, LISTED_TEXT, b"")
    assert shim.seen == [Request(1, f"kata-network.{command}", None)]


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("source", ["file", "-"])
def test_input_is_passed_on_and_the_result_printed(
    state: Path, command: str, source: str, tmp_path: Path
) -> None:
    value = {
        "device": "tap-test",
        "name": "eth\u00e9\n",
        "mtu": 1500,
        "n": 1.5,
        "l": [None, True, {"a": "b\\"}],
    }
    text = json.dumps(value, indent=4).encode().replace(b"\n", b"\r\n")
    (tmp_path / "in.json").write_bytes(text)
    file = str(tmp_path / "in.json") if source == "file" else "-"
    with peer(state, ID, sends(messages.result(1, {"ok": "é"}))) as shim:
        assert cli(state, "kata-network", command, ID, file, stdin=text) == (0, '{"ok":"é"}\n'.encode(), b"")
    assert shim.seen == [Request(1, f"kata-network.{command}", value)]


@pytest.mark.parametrize("prefix", ["6", "6ec7", ID])
def test_any_unambiguous_prefix_is_the_id(state: Path, prefix: str) -> None:
    with peer(state, ID, sends(messages.result(1, None))):
        assert cli(state, "kata-network", "list-ifaces", prefix) == (0, b"null\n", b"")


def test_exact_id_wins_over_longer_ones(state: Path) -> None:
    (state / "sandboxes" / f"{ID}-2").mkdir()
    with peer(state, ID, sends(messages.result(1, None))):
        assert cli(state, "kata-network", "list-ifaces", ID) == (0, b"null\n", b"")
        assert cli(state, "kata-network", "list-ifaces", "6ec") == (
            1,
            b"null\n",
            b"multiple containers found (6ec)\n",
        )


@pytest.mark.parametrize("command", READING + LISTING)
@pytest.mark.parametrize("where", range(4))
def test_flags_stand_anywhere(state: Path, command: str, where: int) -> None:
    words = ["kata-network", command, ID, *(["-"] if command in READING else [])]
    words[where:where] = ["--root", str(state)] if where % 2 else [f"--root={state}"]
    with peer(state, ID, sends(messages.result(1, None))):
        done = subprocess.run([CLI, *words], input=b"{}", capture_output=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, b"null\n", b"")


def test_root_from_the_environment(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, None))):
        done = subprocess.run(
            [CLI, "kata-network", "list-ifaces", ID],
            capture_output=True,
            env={**environment(), "KATA_SHIM_ROOT": str(state)},
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"null\n", b"")


@pytest.mark.parametrize(
    ("id_words", "message"),
    [
        ([], "Missing container ID"),
        ([""], "Missing container ID"),
        (["x"], "no such container ID (x)"),
        (["../root"], "no such container ID (../root)"),
        (["."], "no such container ID (.)"),
        ([".."], "no such container ID (..)"),
        (["/"], "no such container ID (/)"),
        (["6ec7a98d/"], "no such container ID (6ec7a98d/)"),
        (["6\n"], r"no such container ID (6\n)"),
        (["\x1b[2J"], r"no such container ID (\x1b[2J)"),
        (["a" * 65], f"no such container ID ({'a' * 65})"),
    ],
)
def test_ids_that_name_no_sandbox(state: Path, id_words: list[str], message: str) -> None:
    assert cli(state, "kata-network", "list-ifaces", *id_words) == (1, b"null\n", f"{message}\n".encode())


def test_no_root_at_all(tmp_path: Path) -> None:
    assert cli(tmp_path / "none", "kata-network", "list-ifaces", "x") == (
        1,
        b"null\n",
        b"no such container ID (x)\n",
    )


def test_root_that_others_can_write_is_not_trusted(state: Path) -> None:
    state.chmod(0o770)
    assert cli(state, "kata-network", "list-ifaces", ID) == (
        1,
        b"null\n",
        f"{state}: mode 770 lets group or others write into it\n".encode(),
    )


def test_root_of_someone_else_is_not_trusted(state: Path) -> None:
    os.chown(state, 12345, -1)
    assert cli(state, "kata-network", "list-ifaces", ID) == (
        1,
        b"null\n",
        f"{state}: belongs to uid 12345, not to the caller's\n".encode(),
    )


def test_root_too_long_for_a_socket_address(tmp_path: Path) -> None:
    root = tmp_path / ("r" * 120)
    root.mkdir(mode=0o700)
    with peer(root, "i" * 64, sends(messages.result(1, LISTED))):
        assert cli(root, "kata-network", "list-ifaces", "i") == (0, LISTED_TEXT, b"")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which command?"),
        (["frob"], "frob: unknown command"),
        (["add-iface", ID], "add-iface: a file is needed, or - for stdin"),
        (["add-iface", ID, ""], "add-iface: a file is needed, or - for stdin"),
        (["add-iface", ID, "-", "more"], "add-iface: unexpected argument more"),
        (["list-ifaces", ID, "-"], "list-ifaces: unexpected argument -"),
        (["list-ifaces", "--frob", ID], "--frob: unknown flag"),
        (["list-ifaces", ID, "-x"], "-x: unknown flag"),
        (["list-ifaces", ID, "--root"], "--root: needs a value"),
    ],
)
def test_misuse(state: Path, words: list[str], message: str) -> None:
    status, out, err = cli(state, "kata-network", *words)
    assert (status, out) == (2, b"null\n")
    lines = err.decode().splitlines()
    assert lines[0] == f"kata-runtime kata-network: {message}"
    assert lines[1] == "usage: kata-runtime [--root DIR] kata-network COMMAND ID [FILE|-]"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "stdin:1:1: expecting value"),
        (b" \n ", "stdin:2:2: expecting value"),
        (b'{\n  "mtu": }', "stdin:2:10: expecting value"),
        (b'{"a":1} {"b":2}', "stdin:1:9: extra data"),
        (b'{"a":1},"method":"x"', "stdin:1:8: extra data"),
        (b"{'a':1}", "stdin:1:2: expecting property name enclosed in double quotes"),
        (b'{"a":"\n"}', "stdin:1:7: invalid control character at"),
        (b'{"a":\n"NaN",\n"b": NaN}', "stdin:3:6: NaN is not JSON"),
        (b"[-Infinity]", "stdin:1:2: -Infinity is not JSON"),
        (b"[1,\n 1e999]", "stdin:2:2: 1e999 is beyond every number"),
        (b"[1,\n -%s]" % (b"7" * 5000), f"stdin:2:2: -{'7' * 63} has more digits than any number here"),
        (b'{"a":1,"a":2}', "stdin: the key 'a' stands twice in one object"),
        (b'["\\ud800"]', "stdin: half a surrogate pair: '\\ud800'"),
        (b'{"a":\n\xff}', "stdin:2:1: byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbf{}", "stdin:1:1: a byte order mark, which JSON has not; save the file without it"),
        (b"[" * 200_000, "stdin: nested too deeply"),
        (b" " * 1024 * 1024 + b"1", "stdin: more than 1048576 bytes"),
    ],
)
def test_input_that_is_not_one_json_value(state: Path, data: bytes, message: str) -> None:
    assert cli(state, "kata-network", "add-iface", ID, "-", stdin=data) == (
        1,
        b"null\n",
        f"{message}\n".encode(),
    )


def test_longest_input(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, None))):
        data = b" " * (1024 * 1024 - 1) + b"1"
        assert cli(state, "kata-network", "add-iface", ID, "-", stdin=data) == (0, b"null\n", b"")


def test_escaped_text_is_passed_on(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, None))) as shim:
        data = b'["\\ud83d\\ude00"]'
        assert cli(state, "kata-network", "add-iface", ID, "-", stdin=data)[0] == 0
    assert shim.seen == [Request(1, "kata-network.add-iface", ["😀"])]


@pytest.mark.parametrize(
    ("file", "message"), [("none.json", "No such file or directory"), (".", "Is a directory")]
)
def test_file_that_cannot_be_read(state: Path, file: str, message: str) -> None:
    path = state / file
    assert cli(state, "kata-network", "add-iface", ID, str(path)) == (
        1,
        b"null\n",
        f"kata-runtime: {path}: {message}\n".encode(),
    )


def test_error_of_the_shim(state: Path) -> None:
    error = ShimError("invalid-argument", "mtu: 45 is not within 46..9600")
    with peer(state, ID, sends(messages.failure(1, error))):
        assert cli(state, "kata-network", "add-iface", ID, "-", stdin=b"{}") == (
            1,
            b"null\n",
            b"mtu: 45 is not within 46..9600\n",
        )


def test_failed_delete_prints_the_nic(state: Path) -> None:
    nic = {
        "device": "tapname_fun_012",
        "IPAddresses": [{"Family": 0, "Mask": "8"}],
        "linkType": "tap",
        "n": "é",
    }
    error = ShimError("deadline-exceeded", "the guest kept the device", result=nic)
    with peer(state, ID, sends(messages.failure(1, error, ["x: unknown key"]))):
        assert cli(state, "kata-network", "del-iface", ID, "-", stdin=b"{}") == (
            1,
            '{"device":"tapname_fun_012","IPAddresses":[{"Family":0,"Mask":"8"}],"linkType":"tap","n":"é"}\n'.encode(),
            b"x: unknown key\nthe guest kept the device\n",
        )


def test_warnings_go_to_stderr_and_the_result_keeps_its_bytes(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, [1e-7, "é\x7f"], ['a "},"result":1', "b\nc"]))):
        assert cli(state, "kata-network", "list-ifaces", ID) == (
            0,
            '[1e-7,"é\x7f"]\n'.encode(),
            b'a "},"result":1\nb\\nc\n',
        )


@pytest.mark.parametrize(
    "line",
    [
        b'{"warnings":["w"],"id":1,"result":[1]}',
        b'{"id":1,"warnings":["w" ],"result":[1]}',
        b'{"id":1,"warnings":["w"],"result": [1]}',
    ],
)
def test_warnings_in_another_spelling(state: Path, line: bytes) -> None:
    with peer(state, ID, sends(line + b"\n")):
        status, out, err = cli(state, "kata-network", "list-ifaces", ID)
    assert (status, out.replace(b" ", b""), err) == (0, b"[1]\n", b"w\n")


@pytest.mark.parametrize(
    "line",
    [
        b'{"id":1,"warnings":["w","result":1}',
        b'{"id":1,"warnings":["\\x"],"result":1}',
        b'{"id":1,"warnings":["\xff"],"result":1}',
        b'{"id":1,"warnings":["w",],"result":1}',
    ],
)
def test_warnings_that_are_no_json(state: Path, line: bytes) -> None:
    with peer(state, ID, sends(line + b"\n")):
        status, out, err = cli(state, "kata-network", "list-ifaces", ID)
    assert (status, out) == (1, b"null\n")
    assert err.startswith(b"the shim's answer is not of its protocol")


def test_answers_of_other_calls_and_progress_are_passed_over(state: Path) -> None:
    lines = [
        messages.result(7, "other"),
        messages.progress(1, {"step": "x"}),
        messages.failure(7, ShimError("internal", "other")),
        messages.result(1, "mine"),
    ]
    with peer(state, ID, sends(*lines)):
        assert cli(state, "kata-network", "list-ifaces", ID) == (0, b'"mine"\n', b"")


def test_answer_in_pieces(state: Path) -> None:
    big = messages.result(1, "x" * 3_000_000)
    with peer(state, ID, sends(big)):
        status, out, err = cli(state, "kata-network", "list-ifaces", ID)
    assert (status, len(out), err) == (0, 3_000_003, b"")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"garbage\n"], "the shim's answer is not of its protocol: b'garbage'"),
        ([b"[]\n"], "the shim's answer is not of its protocol: b'[]'"),
        ([b"\n"], "the shim's answer is not of its protocol: b''"),
        ([b'{"id":1}\n'], "the shim's answer is not of its protocol: b'{\"id\":1}'"),
        ([b'{"id":1,"error":3}\n'], "the shim answered with an error that is not an object"),
        ([b'{"id":1,"error":{"code":7}}\n'], "no message"),
        ([b'{"id":null,"error":{"code":"internal","message":"bad line"}}\n'], "bad line"),
        ([b'{"id":1,"error":{"code":"internal","message":"a\\nb\\u001b"}}\n'], r"a\nb\x1b"),
        ([b"\xff" * 100 + b"\n"], "the shim's answer is not of its protocol: b'" + r"\xff" * 80 + "'"),
        ([b"x" * (4 * 1024 * 1024 + 1)], "the shim's answer is longer than 4194304 bytes"),
    ],
)
def test_answers_that_are_none(state: Path, lines: list[bytes], message: str) -> None:
    with peer(state, ID, sends(*lines)):
        assert cli(state, "kata-network", "list-ifaces", ID) == (1, b"null\n", f"{message}\n".encode())


@pytest.mark.parametrize("lines", [[], [b'{"id":1,"resu']])
def test_shim_that_ends_first(state: Path, lines: list[bytes]) -> None:
    (state / "sandboxes" / ID / "shim.log").write_text("first\nout of \x1bmemory\n\n")
    with peer(state, ID, sends(*lines, then_close=True)):
        status, out, err = cli(state, "kata-network", "list-ifaces", ID)
    text = f"the shim of {ID} ended before it answered; the last line of its log: out of \\x1bmemory\n"
    assert (status, out, err) == (1, b"null\n", text.encode())


def start(state: Path, *words: str) -> Call:
    return Call(
        [CLI, "--root", str(state), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )


def test_interrupt_cancels_and_waits_for_the_end(state: Path) -> None:
    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Cancel):
            client.sendall(messages.failure(1, ShimError("cancelled", "all undone")))

    with peer(state, ID, reply) as shim, start(state, "kata-network", "list-ifaces", ID) as process:
        shim.wait_for(Request)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"null\n", b"all undone\n")
    assert shim.seen[1:] == [Cancel(1)]


def test_interrupt_too_late_prints_the_result(state: Path) -> None:
    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Cancel):
            client.sendall(messages.result(1, "done"))

    with peer(state, ID, reply) as shim, start(state, "kata-network", "list-ifaces", ID) as process:
        shim.wait_for(Request)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b'"done"\n', b"")


def test_second_interrupt_leaves_at_once(state: Path) -> None:
    with peer(state, ID, sends()) as shim, start(state, "kata-network", "list-ifaces", ID) as process:
        shim.wait_for(Request)
        process.send_signal(signal.SIGINT)
        shim.wait_for(Cancel)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"null\n", b"")


def test_reader_that_has_gone_is_no_news(state: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with peer(state, ID, sends(messages.result(1, LISTED))):
        done = subprocess.run(
            [CLI, "--root", str(state), "kata-network", "list-ifaces", ID],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_full_stdout(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, LISTED))), open("/dev/full", "wb") as full:
        done = subprocess.run(
            [CLI, "--root", str(state), "kata-network", "list-ifaces", ID],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    assert (done.returncode, done.stderr) == (1, b"kata-runtime: stdout: No space left on device\n")


def test_full_stdout_after_a_change(state: Path) -> None:
    """A failure, for the result is lost; but nothing is to be tried again."""
    with peer(state, ID, sends(messages.result(1, LISTED))), open("/dev/full", "wb") as full:
        done = subprocess.run(
            [CLI, "--root", str(state), "kata-network", "add-iface", ID, "-"],
            input=b"{}",
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    message = b"kata-runtime: stdout: No space left on device; add-iface is done all the same\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_closed_stdout_is_not_the_socket(state: Path) -> None:
    with peer(state, ID, sends(messages.result(1, LISTED))) as shim:
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "{CLI}" --root "{state}" kata-network list-ifaces {ID} <&- >&-'],
            stderr=subprocess.PIPE,
            env=environment(),
        )
    assert (done.returncode, done.stderr) == (1, b"kata-runtime: stdout: Bad file descriptor\n")
    assert shim.seen == [Request(1, "kata-network.list-ifaces", None)]


def test_sixteen_at_once(state: Path) -> None:
    results: list[tuple[int, bytes, bytes]] = []
    with peer(state, ID, sends(messages.result(1, LISTED))):
        threads = [
            threading.Thread(target=lambda: results.append(cli(state, "kata-network", "list-ifaces", "6")))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [(0, LISTED_TEXT, b"")] * 16
