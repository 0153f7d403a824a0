"""The entry point kata-runtime: finds the command, and turns every failure into a line and an exit status.

0 is success, 1 a failure, 2 a wrong command line, 130 an interrupted command. Only what a command needs is
imported, and only after it is known: list-ifaces is to cost little more than the interpreter's own start.
"""

from __future__ import annotations

import os
import sys

from kata_shim import client, registry
from kata_shim.cli.arguments import Arguments, HelpAsked, UsageError, split
from kata_shim.cli.terminal import say, write
from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


class Command:
    """One command: where it is, what it takes, and what stands on stdout when it fails."""

    def __init__(
        self,
        place: str,
        usage: str,
        about: str,
        *,
        flags: dict[str, bool] | None = None,
        words: tuple[int, int | None] = (1, 1),
        on_failure: bytes = b"",
    ) -> None:
        self.place = place
        self.usage = usage
        self.about = about
        self.flags = {"--root": True, **(flags or {})}
        self.words = words
        self.on_failure = on_failure

    def load(self) -> Callable[[Arguments], int]:
        """Import the command's module and return its function."""
        module, _, function = self.place.partition(":")
        loaded: Callable[[Arguments], int] = getattr(
            __import__(f"kata_shim.cli.{module}", fromlist=[function]), function
        )
        return loaded


_IFACE = """
  add-iface ID FILE|-       add a NIC
  update-iface ID FILE|-    change a NIC, found by its name or hwAddr
  del-iface ID FILE|-       remove the NIC of that name
  list-ifaces ID            list the NICs that were added
  add-route ID FILE|-       add a route
  del-route ID FILE|-       delete every route that matches
  list-routes ID            list the routes
  update-routes ID FILE|-   make the routes exactly these"""

_OF_A_COMMAND = {"--env": True, "--cwd": True, "--tty": False, "-t": False}

COMMANDS = {
    "run": Command(
        "run:run",
        "[--detach] [--config FILE] [--rootfs DIR [-t] [--env NAME=VALUE]... [--cwd DIR]] ID [COMMAND...]",
        """start a sandbox; without --detach, delete it on SIGINT, SIGTERM or when it stops
  --rootfs DIR   run COMMAND, or /bin/sh, in a container of which DIR is the root file system;
                 a block device or image file with an ext4 or xfs goes into the guest as a disk
  -t, --tty      give COMMAND a terminal, joined to the one at stdin""",
        flags={"--detach": False, "--config": True, "--rootfs": True, **_OF_A_COMMAND},
        words=(1, None),
    ),
    "list": Command(
        "sandbox:list_all", "[--json]", "list the sandboxes", flags={"--json": False}, words=(0, 0)
    ),
    "state": Command("sandbox:state", "ID", "print a sandbox's state"),
    "exec": Command(
        "execute:execute",
        "[-t] [--env NAME=VALUE]... [--cwd DIR] [--guest] ID -- COMMAND...",
        """run a command in a container, or in the guest where there is none, or with --guest
  -t, --tty      give it a terminal, joined to the one at stdin; not in the guest""",
        flags={"--guest": False, **_OF_A_COMMAND},
        words=(1, None),
    ),
    "delete": Command(
        "sandbox:delete",
        "[--force] ID",
        "delete a sandbox that has stopped; with --force, any",
        flags={"--force": False},
    ),
    "kata-network": Command(
        "network:network",
        "COMMAND ID [FILE|-]",
        "NICs and routes of a running sandbox" + _IFACE,
        words=(0, None),
        on_failure=b"null\n",
    ),
    "kata-ipvs": Command(
        "ipvs:ipvs",
        "COMMAND FLAG... ID",
        """IPVS rules of a running sandbox, in ipvsadm's language
  ipvsadm --parameters "RULE"   do what one of ipvsadm's command lines says
  ipvsadm --restore FILE|-      make the rules of a file the table, which must be empty
  ipvsadm --replace FILE|-      change the table to the rules of a file, and no more than that takes;
                                with --dry-run print the changes
  cleanup --parameters "--orig-dst IP --protonum tcp|udp"
                                delete conntrack entries
  --dialect ipvsadm   with --parameters: the whole language, ipvsadm's own messages and statuses;
                      with --restore: on top of whatever rules there are
  --json              with --parameters: a list of services as JSON""",
        flags={
            "--parameters": True,
            "--restore": True,
            "--replace": True,
            "--dialect": True,
            "--json": False,
            "--dry-run": False,
        },
        words=(0, None),
        on_failure=b"null\n",
    ),
    "kata-check": Command(
        "check:check",
        "[--json] [--config FILE]",
        "tell whether and how this host can run sandboxes",
        flags={"--json": False, "--config": True},
        words=(0, 0),
    ),
    "factory": Command(
        "factory:factory",
        "init|status|destroy [--config FILE] [--json]",
        """keep sandboxes ready that `run` only has to take
  init      make templates and VMs as configuration.toml's [factory] has it, until SIGINT or SIGTERM
  status    tell what there is; with --json as one JSON object
  destroy   end the factory and remove the templates""",
        flags={"--config": True, "--json": False},
        words=(0, 1),
    ),
    "version": Command("check:version", "", "print the version", words=(0, 0)),
}


def main() -> NoReturn:
    """Run the command line of this process and end it."""
    _keep_standard_descriptors()
    try:
        status = _run(sys.argv[1:])
    except BrokenPipeError:
        status = 1  # Who read our stdout has had enough.
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        say(_cause(error))
        status = 1
    # Nothing is buffered, and there is nothing to tear down that would be worth a millisecond.
    os._exit(status)


def _run(tokens: list[str]) -> int:
    name, rest, root = "", tokens, ""
    try:
        name, rest, root = _find_command(tokens)
        if name == "help":
            if rest and rest[0] not in (*COMMANDS, "help"):
                raise UsageError(f"{rest[0]}: unknown command")
            write(1, _help(rest[0] if rest else "").encode())
            return 0
        command = COMMANDS[name]
    except UsageError as error:
        say(f"kata-runtime: {error}")
        write(2, _help("").encode())
        return 2
    try:
        return _dispatch(name, command, rest, root)
    except HelpAsked:
        write(1, _help(name).encode())
        return 0
    except UsageError as error:
        say(f"kata-runtime {name}: {error}")
        write(2, _help(name).encode())
        status = 2
    except ShimError as error:
        say(error.message)
        write(1, _result_in_spite(error) or command.on_failure)
        return 130 if isinstance(error, client.CancelledError) else 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if isinstance(error, OSError) and error.filename == "stdout":
            raise
        say(_cause(error))
        status = 1
    write(1, command.on_failure)
    return status


def _find_command(tokens: list[str]) -> tuple[str, list[str], str]:
    """Return the command, what follows it, and the root given before it. Raises UsageError."""
    root = ""
    position = 0
    while position < len(tokens) and tokens[position].startswith("-"):
        token = tokens[position]
        position += 1
        if token in ("-h", "--help"):
            return "help", tokens[position:], root
        if token in ("-v", "--version"):
            return "version", [], root
        name, equals, root = token.partition("=")
        if name != "--root":
            raise UsageError(f"{name}: unknown flag")
        if not equals:
            if position == len(tokens):
                raise UsageError("--root: needs a value")
            root = tokens[position]
            position += 1
    if position == len(tokens):
        raise UsageError("which command?")
    name, rest = tokens[position], tokens[position + 1 :]
    if name != "help" and name not in COMMANDS:
        raise UsageError(f"{name}: unknown command")
    if name in ("kata-network", "kata-ipvs") and rest[:1] == ["help"]:
        return "help", [name], root
    return name, rest, root


def _dispatch(name: str, command: Command, tokens: list[str], root: str) -> int:
    runs_command = name == "exec" or (name == "run" and any(one.startswith("--rootfs") for one in tokens))
    words, flags = split(tokens, command.flags, command_after=int(runs_command))
    least, most = command.words
    if most is not None and len(words) > most:
        raise UsageError(f"unexpected argument {words[most]}")
    if len(words) < least:
        raise ShimError("invalid-argument", "Missing container ID")
    root = flags.get("--root", [root])[-1] or os.environ.get("KATA_SHIM_ROOT") or registry.DEFAULT_ROOT
    return command.load()(Arguments(words, flags, os.path.abspath(root)))


def _help(name: str) -> str:
    if name in COMMANDS:
        command = COMMANDS[name]
        return f"usage: kata-runtime [--root DIR] {name} {command.usage}".rstrip() + f"\n{command.about}\n"
    lines = [f"  {key:14}{command.about.splitlines()[0]}" for key, command in COMMANDS.items()]
    return "\n".join(
        ["usage: kata-runtime [--root DIR] COMMAND [ARGUMENT]...", *lines, "  help COMMAND  tell how", ""]
    )


def _result_in_spite(error: ShimError) -> bytes:
    """Return what a failure is documented to print on stdout all the same; del-iface has such a thing."""
    if "result" not in error.attrs:
        return b""
    import json

    return json.dumps(error.attrs["result"], ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"kata-runtime: {place}{error.strerror}"
    return f"kata-runtime: {type(error).__name__}: {error}"


def _keep_standard_descriptors() -> None:
    """Fill closed standard descriptors, lest a socket gets the number of stdout and the result goes there."""
    for descriptor, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            # Opened the wrong way round, so that using what was closed is still an error; stderr may be lost.
            os.open("/dev/null", flags)
