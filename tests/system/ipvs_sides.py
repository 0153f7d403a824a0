"""One sequence of lines done by our command, and by ipvsadm in another guest just like it."""

from __future__ import annotations

import json
import re
import select
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kata_shim import shims
from kata_shim.errors import ShimError
from tests.started import PATIENCE
from tests.support import Guest, Result
from tests.system.ipvs import DONE, ipvsadm_restore
from tests.system.ipvs_lines import HOSTS, SERVICES, Line, Restore, Step

# Runs ipvsadm in the guest: [words, stdin] of each come in as a line of JSON, their results go out as one.
RUNNER = r"""
import json, os, sys
files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
actions = [(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(files)]
def run(words, stdin):
    for file in files:
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
    os.pwrite(files[0], stdin.encode(), 0)
    pid = os.posix_spawn("/usr/sbin/ipvsadm", ["ipvsadm", *words], {}, file_actions=actions)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [status, *(os.pread(file, os.fstat(file).st_size, 0).decode() for file in files[1:])]
for line in sys.stdin:
    print(json.dumps([run(*one) for one in json.loads(line)]), flush=True)
"""
# A program lies at the same place of memory each time: what emulates it needs no new translation.
AT_THE_SAME_PLACE = "echo 0 > /proc/sys/kernel/randomize_va_space"
RESTORE = "rules are restored by --restore FILE or --restore -\n"
# What ipvsadm says of options, so that the kernel has not seen their line; its status is 255 there too.
_OPTION_ERRORS = re.compile(r"Try `|.*: (unknown option|missing argument|option does not take an argument)$")


class End(NamedTuple):
    """How a sequence ends: with lines that show what it has made, and then with those that undo it."""

    views: list[Line]
    undoing: list[Line]


def prepare(guest: Guest) -> None:
    """Give a guest names of hosts and services, so that there is something to look up."""
    for path, text in (("/etc/hosts", HOSTS), ("/etc/services", SERVICES)):
        assert guest.run("sh", "-c", f"cat > {path}", stdin=text.encode()) == DONE
    assert guest.run("sh", "-c", AT_THE_SAME_PLACE) == DONE


class ByConnection:
    """Our command as its shim answers it; what the command makes of that, `by_command` shows."""

    def __init__(self, guest: Guest) -> None:
        """Connect to the guest's shim."""
        self._connection = shims.connect(str(guest.runtime.root), guest.id)
        self._connection.socket.settimeout(PATIENCE)

    def __call__(self, step: Step) -> Result:
        """Do one step."""
        method, name = ("ipvsadm", "parameters") if isinstance(step, Line) else ("restore", "rules")
        params = json.dumps({name: str(step), "dialect": "ipvsadm"}).encode()
        try:
            answer: Any = json.loads(self._connection.call(f"kata-ipvs.{method}", params))
        except ShimError as error:
            return Result(1, "null\n", f"{error.message}\n")
        return Result(**answer) if isinstance(answer, dict) else Result(0, answer, "")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def by_command(guest: Guest) -> Callable[[Step], Result]:
    """Our command itself."""

    def run(step: Step) -> Result:
        if isinstance(step, Restore):
            return ipvsadm_restore(guest, str(step))
        return guest.ipvsadm(str(step), "--dialect", "ipvsadm")

    return run


class Theirs:
    """ipvsadm in a guest."""

    def __init__(self, guest: Guest) -> None:
        """Start what runs it."""
        command = guest.runtime.command("exec", guest.id, "--", "python3", "-c", RUNNER)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=guest.runtime.environment, text=True
        )

    def ask(self, steps: list[Step]) -> None:
        """Have steps done, to be collected by `answers` before anything else is asked."""
        assert self._process.stdin is not None
        asked = [(step.words, "") if isinstance(step, Line) else (("-R",), str(step)) for step in steps]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def answers(self) -> list[Result]:
        """Return what came of the steps that were asked."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        assert readable, "ipvsadm, or its guest, stands still"
        return [Result(*answer) for answer in json.loads(self._process.stdout.readline())]

    def whole(self, steps: list[Step], end: End, answers: list[Result]) -> list[Result]:
        """Return what would have come of `steps` and then `end` if each file were done whole or not at all.

        `answers` are ipvsadm's, which may have done a part of a file.
        """
        for at, step in enumerate(steps):
            if isinstance(step, Restore) and answers[at] != DONE:
                refusal = self._refusal(steps[:at], step, end.undoing)
                rest = steps[:at] + steps[at + 1 :]
                self.ask([*rest, *end.views, *end.undoing])
                answers = self.whole(rest, end, self.answers())
                return [*answers[:at], refusal, *answers[at:]]
        return answers

    def _refusal(self, before: list[Step], file: Restore, undoing: list[Line]) -> Result:
        """Return how a file is refused: for its first line that is wrong, or else that the kernel refuses."""
        bare = [words[1:] if words[:1] == ("ipvsadm",) else words for words in file.lines]
        lines = [(number, Line(words)) for number, words in enumerate(bare, 1) if words]
        self.ask([*before, *(line for _, line in lines), *undoing])
        said = self.answers()[len(before) :]
        refused = [
            (number, answer) for (number, _), answer in zip(lines, said, strict=False) if answer != DONE
        ]
        wrong = [(number, answer) for number, answer in refused if _is_wrong(answer)]
        assert refused, f"ipvsadm refuses this as a whole, but no line of it alone:\n{file}"
        number, answer = (wrong or refused)[0]
        return Result(1, "null\n", f"line {number}: {answer.stderr.rstrip()}\n")

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        assert self._process.returncode == 0


def _is_wrong(answer: Result) -> bool:
    """Whether ipvsadm has refused a line itself."""
    return answer.status == 2 or _OPTION_ERRORS.match(answer.stderr.rstrip()) is not None


@dataclass(frozen=True)
class Sides:
    """Our guest, and theirs."""

    ours: Guest
    theirs: Theirs

    def agree(self, ours: Callable[[Step], Result], steps: list[Step]) -> None:
        """Do steps on both sides; fails where the answers part, or the tables in the end."""
        end = _end(steps)
        whole = [*steps, *end.views, *end.undoing]
        self.theirs.ask(whole)
        try:
            given = [ours(step) for step in whole]
        finally:
            answers = self.theirs.answers()
        wanted = self.theirs.whole(steps, end, answers)
        for number, (step, mine, other) in enumerate(zip(whole, given, wanted, strict=True)):
            got, want = _unordered(step, _told_alike(step, mine)), _unordered(step, _done_alike(step, other))
            before = "".join(f"  {each!s}\n" for each in whole[:number])
            assert got == want, f"after\n{before}of {step!s}\nours   {got}\ntheirs {want}"


def _end(steps: list[Step]) -> End:
    said = " ".join(map(str, steps))
    views, undoing = ["-Sn", "-Ln", "-Ln --thresholds"], ["-C"]
    if "--set" in said:
        views.append("-L --timeout")
        undoing.append("--set 900 120 300")
    if "--start-daemon" in said:
        views.append("-L --daemon")
        undoing += ["--stop-daemon master", "--stop-daemon backup"]
    return End(*([Line(tuple(line.split())) for line in lines] for lines in (views, undoing)))


def _done_alike(step: Step, theirs: Result) -> Result:
    """Return ipvsadm's answer as it would be if `-R` were no parameter."""
    if isinstance(step, Line) and step.words[:1] in (("-R",), ("--restore",)) and theirs == DONE:
        return Result(2, "", RESTORE)
    return theirs


def _told_alike(step: Step, ours: Result) -> Result:
    """Return our answer without what ipvsadm leaves out."""
    if not isinstance(step, Line) or ours.status:
        return ours
    lines = [_without_thresholds(_without_odd_flags(line)) for line in ours.stdout.splitlines(keepends=True)]
    return replace(ours, stdout="".join(lines))


def _unordered(step: Step, answer: Result) -> Result:
    """Return an answer without an order that is each kernel's own.

    Unsorted, services stand as a hash has them that begins at another place in each guest, and servers as
    they were added: again, where a file has been taken back.
    """
    if not isinstance(step, Line) or "--nosort" not in step.words:
        return answer
    found, service = list[str](), ""
    for line in answer.stdout.splitlines(keepends=True):
        service = service if line.startswith("  ->") else line
        found.append(f"{service} {line}")
    return replace(answer, stdout="".join(sorted(found)))


def _without_odd_flags(line: str) -> str:
    """Of sh and mh only their own flags are listed."""
    return re.sub(r",?flag-3", "", line) if re.search(r" (sh|mh) \(|-s (sh|mh) ", line) else line


def _without_thresholds(line: str) -> str:
    """They are not saved."""
    return re.sub(r" -[xy] \d+", "", line) if line.startswith("-a ") else line
