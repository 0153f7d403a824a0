"""kata-runtime's other commands, the real process against a shim's end that misbehaves: bytes and status."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kata_shim
from kata_shim import messages
from kata_shim.errors import ShimError
from kata_shim.messages import Cancel, Request, Stdin
from tests.component.cli_peer import CLI, Message, cli, environment, peer, sends
from tests.support import Call

pytestmark = pytest.mark.quick

USAGE = b"usage: kata-runtime [--root DIR] COMMAND [ARGUMENT]...\n"
RUNNING = {"id": "a1", "state": "running", "pid": 7, "accelerator": "tcg", "created": "2024-01-01T00:00:00Z"}
COMMANDS = [
    "run", "list", "state", "exec", "delete", "kata-network", "kata-ipvs", "kata-check", "factory", "version"
]  # fmt: skip


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An empty root of state."""
    path = tmp_path / "root"
    path.mkdir(mode=0o700)
    return path


def out(data: bytes, stream: str = "stdout") -> bytes:
    return messages.progress(1, {stream: base64.b64encode(data).decode()})


# ---- the command line itself


@pytest.mark.parametrize("words", [["help"], ["-h"], ["--help"]])
def test_help(state: Path, words: list[str]) -> None:
    status, text, err = cli(state, *words)
    assert (status, err) == (0, b"")
    assert text.startswith(USAGE)
    assert [line.split()[0] for line in text.decode().splitlines()[1:]] == [*COMMANDS, "help"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["{0} -h", "{0} --help", "help {0}", "--help {0}", "{0} x --help"])
def test_help_for_each_command(state: Path, command: str, how: str) -> None:
    status, text, err = cli(state, *how.format(command).split())
    assert (status, err) == (0, b"")
    assert text.startswith(f"usage: kata-runtime [--root DIR] {command}".encode())


@pytest.mark.parametrize("group", ["kata-network", "kata-ipvs"])
def test_help_for_a_group_as_a_word(state: Path, group: str) -> None:
    assert cli(state, group, "help") == cli(state, "help", group)


@pytest.mark.parametrize("words", [["version"], ["--version"], ["-v"]])
def test_version(state: Path, words: list[str]) -> None:
    text = f"kata-runtime  : {kata_shim.__version__}\n   OCI specs: 1.0.2\n"
    assert cli(state, *words) == (0, text.encode(), b"")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "kata-runtime: which command?"),
        (["frob"], "kata-runtime: frob: unknown command"),
        (["help", "frob"], "kata-runtime: frob: unknown command"),
        (["--help", "frob"], "kata-runtime: frob: unknown command"),
        (["--frob", "list"], "kata-runtime: --frob: unknown flag"),
        (["--root"], "kata-runtime: --root: needs a value"),
        (["list", "x"], "kata-runtime list: unexpected argument x"),
        (["list", "--json=1"], "kata-runtime list: --json: takes no value"),
        (["state", "x", "y"], "kata-runtime state: unexpected argument y"),
        (["delete", "--json", "x"], "kata-runtime delete: --json: unknown flag"),
        (["run", "x", "--config"], "kata-runtime run: --config: needs a value"),
        (["run", "--", "-x", "-y"], "kata-runtime run: a command needs --rootfs"),
        (["kata-check", "x"], "kata-runtime kata-check: unexpected argument x"),
        (["version", "--all"], "kata-runtime version: --all: unknown flag"),
    ],
)
def test_misuse(state: Path, words: list[str], message: str) -> None:
    status, text, err = cli(state, *words)
    assert (status, text) == (2, b"")
    assert err.decode().splitlines()[0] == message
    assert err.decode().splitlines()[1].startswith("usage: kata-runtime [--root DIR] ")


@pytest.mark.parametrize("command", ["run", "state", "exec", "delete"])
def test_missing_id(state: Path, command: str) -> None:
    assert cli(state, command) == (1, b"", b"Missing container ID\n")


@pytest.mark.parametrize("words", [["state", "x"], ["exec", "x", "ls"], ["delete", "x"]])
def test_unknown_id(state: Path, words: list[str]) -> None:
    assert cli(state, *words) == (1, b"", b"no such container ID (x)\n")


def test_forced_delete_of_nothing_is_done(state: Path) -> None:
    assert cli(state, "delete", "--force", "x") == (0, b"", b"")
    with peer(state, "x1", sends()), peer(state, "x2", sends()):
        message = b"multiple containers found (x)\n"
        assert cli(state, "delete", "--force", "x") == (1, b"", message)


# ---- state, list, delete


def test_state(state: Path) -> None:
    with peer(state, "a1", sends(messages.result(1, RUNNING))) as shim:
        assert cli(state, "state", "a") == (
            0,
            b'{"ociVersion":"1.0.2","id":"a1","status":"running","pid":7,'
            b'"accelerator":"tcg","created":"2024-01-01T00:00:00Z"}\n',
            b"",
        )
    assert shim.seen == [Request(1, "sandbox.state", None)]


def test_id_that_looks_like_a_flag(state: Path) -> None:
    with peer(state, "-x", sends(messages.result(1, RUNNING))):
        assert cli(state, "state", "--", "-x")[0] == 0


def test_empty_list(state: Path) -> None:
    assert cli(state, "list") == (0, b"ID  STATE  PID  ACCELERATOR  CREATED\n", b"")
    assert cli(state, "list", "--json") == (0, b"[]\n", b"")
    assert cli(state / "none", "list", "--json") == (0, b"[]\n", b"")


def test_list(state: Path) -> None:
    """One that answers, one that answers garbage, one that never answers; what is no id is not listed."""
    for name in ("not an id", "b" * 65):
        (state / "sandboxes" / name).mkdir(parents=True)
    with (
        peer(state, "a1", sends(messages.result(1, RUNNING))),
        peer(state, "b", sends(b"garbage\n")),
        peer(state, "silent", sends()),
    ):
        (state / "sandboxes" / "b" / "record.json").write_text("garbage")
        text = cli(state, "list")
        listed = cli(state, "list", "--json")
    assert text == (
        0,
        b"ID      STATE    PID  ACCELERATOR  CREATED\n"
        b"a1      running  7    tcg          2024-01-01T00:00:00Z\n"
        b"b       unknown  -    -            -\n"
        b"silent  unknown  -    -            -\n",
        b"silent: its shim does not answer within 2 s\n",
    )
    assert (listed[0], listed[2]) == (0, text[2])
    assert [(one["id"], one["status"], one["pid"]) for one in json.loads(listed[1])] == [
        ("a1", "running", 7),
        ("b", "unknown", 0),
        ("silent", "unknown", 0),
    ]


@pytest.mark.parametrize(
    ("words", "force"), [(["a"], False), (["--force", "a"], True), (["a", "--force"], True)]
)
def test_delete(state: Path, words: list[str], force: bool) -> None:
    with peer(state, "a1", sends(messages.result(1, None))) as shim:
        assert cli(state, "delete", *words) == (0, b"", b"")
    assert shim.seen == [Request(1, "sandbox.delete", {"force": force})]


def test_delete_is_refused(state: Path) -> None:
    error = ShimError("failed-precondition", "a1 is running; use --force")
    with peer(state, "a1", sends(messages.failure(1, error))):
        assert cli(state, "delete", "a1") == (1, b"", b"a1 is running; use --force\n")


# ---- exec


def test_exec_joins_stdin_stdout_stderr_and_status(state: Path) -> None:
    data = bytes(range(256)) * 4096

    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Stdin) and message.data is not None:
            taken = messages.progress(1, {"stdin": 1})
            client.sendall(taken + out(message.data) + out(message.data[::-1], "stderr"))
        elif isinstance(message, Stdin):
            client.sendall(messages.result(1, {"exit_status": 42}))

    with peer(state, "a1", reply) as shim:
        status, text, err = cli(state, "exec", "a", "--", "cat", "-", "--root", stdin=data)
    assert (status, text, len(err)) == (42, data, len(data))
    assert shim.seen[0] == Request(
        1, "sandbox.exec", {"argv": ["cat", "-", "--root"], "env": {}, "cwd": None}
    )
    assert shim.seen[-1] == Stdin(1, None)


@pytest.mark.parametrize(
    ("words", "params"),
    [
        (["a", "ls"], {"argv": ["ls"]}),
        (["a", "ls", "-l", "--", "--env"], {"argv": ["ls", "-l", "--", "--env"]}),
        (["a", "--", "--", "x"], {"argv": ["--", "x"]}),
        (["--cwd", "/x", "a", "ls", "--cwd"], {"argv": ["ls", "--cwd"], "cwd": "/x"}),
        (["a", "--cwd=/x", "--env=A=", "--", "ls"], {"argv": ["ls"], "cwd": "/x", "env": {"A": ""}}),
        (["--env", "A=1=2", "a", "--env", "B=é", "ls"], {"argv": ["ls"], "env": {"A": "1=2", "B": "é"}}),
        (["--", "a", "--", "ls"], {"argv": ["ls"]}),
    ],
)
def test_exec_arguments(state: Path, words: list[str], params: dict[str, object]) -> None:
    with peer(state, "a1", sends(messages.result(1, {"exit_status": 0}))) as shim:
        assert cli(state, "exec", *words) == (0, b"", b"")
    assert shim.seen[0] == Request(1, "sandbox.exec", {"argv": [], "env": {}, "cwd": None, **params})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a1"], b"which command?"),
        (["a1", "--"], b"which command?"),
        (["a1", "--env", "A", "ls"], b"--env: A is not NAME=VALUE"),
        (["a1", "--frob", "ls"], b"--frob: unknown flag"),
    ],
)
def test_exec_misuse(state: Path, words: list[str], message: bytes) -> None:
    with peer(state, "a1", sends()):
        status, text, err = cli(state, "exec", *words)
    assert (status, text, err.splitlines()[0]) == (2, b"", b"kata-runtime exec: " + message)


def test_exec_of_bytes_that_are_no_text(state: Path) -> None:
    with peer(state, "a1", sends()):
        done = subprocess.run(
            [CLI, b"--root", bytes(state), b"exec", b"a1", b"\xff"], capture_output=True, env=environment()
        )
    assert (done.returncode, done.stderr) == (1, b"argv, --env, --cwd: not UTF-8\n")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([messages.result(1, {})], b"the shim's answer is not of its protocol: b'{}'\n"),
        ([messages.result(1, {"exit_status": 256})], b"the shim's answer is not of its protocol: b'{\"exit_"),
        ([messages.result(1, {"exit_status": "0"})], b"the shim's answer is not of its protocol: b'{\"exit_"),
        ([messages.progress(1, {"stdout": "?"})], b"the shim's stdout is not base64\n"),
        ([messages.progress(1, {"stderr": 1})], b"the shim's stderr is not base64\n"),
        ([b"garbage\n"], b"the shim's answer is not of its protocol: b'garbage'\n"),
        (
            [messages.failure(1, ShimError("not-found", "argv: no ls in the guest"))],
            b"argv: no ls in the guest\n",
        ),
    ],
)
def test_exec_that_fails(state: Path, lines: list[bytes], message: bytes) -> None:
    with peer(state, "a1", sends(*lines)):
        status, text, err = cli(state, "exec", "a1", "ls")
    assert (status, text, err[: len(message)]) == (1, b"", message)


def test_exec_whose_shim_ends(state: Path) -> None:
    with peer(state, "a1", sends(out(b"half"), then_close=True)):
        message = b"the shim of a1 ended before it answered\n"
        assert cli(state, "exec", "a1", "ls") == (1, b"half", message)


def test_exec_without_stdin(state: Path) -> None:
    with peer(state, "a1", sends(messages.result(1, {"exit_status": 0}))):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "{CLI}" --root "{state}" exec a1 ls <&-'],
            capture_output=True,
            env=environment(),
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def start_exec(state: Path, stdin: int = subprocess.PIPE) -> Call:
    return Call(
        [CLI, "--root", str(state), "exec", "a1", "--", "sleep", "9"],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_exec_is_cancelled_by_a_signal(state: Path, number: int) -> None:
    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Cancel):
            client.sendall(out(b"last words") + messages.failure(1, ShimError("cancelled", "killed")))

    with peer(state, "a1", reply) as shim, start_exec(state) as process:
        shim.wait_for(Request)
        process.send_signal(number)
        text, err = process.communicate(timeout=20)
    assert (process.returncode, text, err) == (128 + number, b"last words", b"")


def test_exec_second_signal_leaves_at_once(state: Path) -> None:
    with peer(state, "a1", sends()) as shim, start_exec(state) as process:
        shim.wait_for(Request)
        process.send_signal(signal.SIGINT)
        shim.wait_for(Cancel)
        process.send_signal(signal.SIGTERM)
        text, err = process.communicate(timeout=20)
    assert (process.returncode, text, err) == (130, b"", b"")


def test_exec_shows_output_while_stdin_is_stuck(state: Path) -> None:
    """A shim that takes no stdin does not keep the command's output back."""

    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Stdin):
            while True:  # Reads nothing more; writes until the CLI has gone.
                client.sendall(out(b"x" * 4096))

    endless = os.open("/dev/zero", os.O_RDONLY)
    with peer(state, "a1", reply), start_exec(state, endless) as process:
        os.close(endless)
        assert process.stdout is not None
        assert len(process.stdout.read(8 * 1024 * 1024)) == 8 * 1024 * 1024
        process.kill()


def test_exec_whose_reader_has_gone(state: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with peer(state, "a1", sends(out(b"x"))):
        done = subprocess.run(
            [CLI, "--root", str(state), "exec", "a1", "ls"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


# ---- kata-check

CHECKER = "import sys; from kata_shim.cli.main import main; sys.executable = sys.argv.pop(1); main()"


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        (
            'echo \'{"accelerator":"tcg","kvm":{"usable":false,"why":null},"tools":["a","b"]}\'',
            [],
            (
                0,
                b"accelerator : tcg\nkvm usable  : no\nkvm why     : -\ntools       : a\ntools       : b\n",
                b"",
            ),
        ),
        ("echo []", ["--json"], (1, b"", b"the check ended with status 0 and no answer\n")),
        (
            'printf \'{"a":"%s"}\' "$*"',
            ["--config", "/c", "--json", "--root=/r"],
            (0, b'{"a":"-I -m kata_shim.shim check --root /r --config /c"}\n', b""),
        ),
        ("echo '{\"ok\":false}'; exit 1", ["--json"], (1, b'{"ok":false}\n', b"")),
        ("echo no qemu >&2; exit 3", [], (1, b"", b"no qemu\nthe check ended with status 3 and no answer\n")),
    ],
)
def test_kata_check(
    tmp_path: Path, script: str, words: list[str], expected: tuple[int, bytes, bytes]
) -> None:
    checker = tmp_path / "python"
    checker.write_text(f"#!/bin/sh\n{script}\n")
    checker.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", CHECKER, str(checker), "kata-check", *words],
        capture_output=True,
        env=environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == expected
