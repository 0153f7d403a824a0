"""A process that stands where the shim does and misbehaves as the environment's BEHAVIOUR says.

Started as `python -I -m kata_shim.shim serve --root DIR --listen-fd N ID` would be; writes "started" to its
stdout, which the client has made shim.log.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from pathlib import Path

from kata_shim import messages
from kata_shim.errors import ShimError
from kata_shim.messages import Cancel, Request

BEHAVIOUR = os.environ.get("BEHAVIOUR", "")
_, ROOT, _, DESCRIPTOR, ID = sys.argv[sys.argv.index("serve") + 1 :]
DIRECTORY = Path(ROOT) / "sandboxes" / ID
stopped = threading.Event()
waited_for = threading.Event()
cancelled = threading.Event()
writing = threading.Lock()


def serve(client: socket.socket) -> None:
    """Answer one client."""
    waiting = threading.Thread(target=lambda: None)
    with client, client.makefile("rb") as lines:
        for line in lines:
            message = messages.parse(line)
            if isinstance(message, Cancel):
                cancelled.set()
                (Path(ROOT) / "cancelled").touch()
                with writing:
                    client.sendall(messages.failure(message.id, ShimError("cancelled", "cancelled, undone")))
            elif isinstance(message, Request) and message.method == "sandbox.wait":
                waiting = threading.Thread(target=wait, args=(client, message.id), daemon=True)
                waiting.start()
            elif isinstance(message, Request):
                answer(client, message)


def wait(client: socket.socket, request_id: int | str) -> None:
    """Answer sandbox.wait once the sandbox has stopped."""
    waited_for.set()
    if BEHAVIOUR != "stop":
        stopped.wait()
    client.sendall(messages.result(request_id, {"state": "stopped"}))


def answer(client: socket.socket, request: Request) -> None:
    """Answer everything else."""
    if request.method == "sandbox.start":
        print(f"config {request.params}", flush=True)
        client.sendall(messages.progress(request.id, {"step": "booting\x1b the guest " + "x" * 200}))
        if BEHAVIOUR == "vanish":
            os._exit(1)
        if BEHAVIOUR == "refuse":
            error = ShimError("failed-precondition", "kernel: /none does not exist")
            client.sendall(messages.failure(request.id, error, ["TCG is used"]))
        elif BEHAVIOUR == "busy":
            threading.Thread(target=report, args=(client, request.id), daemon=True).start()
        elif BEHAVIOUR != "slow":
            client.sendall(messages.result(request.id, {"state": "running"}, ["TCG is used"]))
    elif request.method == "test.waited-for":
        waited_for.wait()
        client.sendall(messages.result(request.id, None))
    elif request.method == "sandbox.delete":
        shutil.rmtree(DIRECTORY)
        client.sendall(messages.result(request.id, None))
        stopped.set()
        os._exit(0)
    else:
        client.sendall(messages.result(request.id, {"id": ID, "state": "running", "pid": os.getpid()}))


def report(client: socket.socket, request_id: int | str) -> None:
    """Send progress as fast as it is read, until the request is cancelled."""
    step = 0
    while not cancelled.is_set():
        with writing:
            client.sendall(messages.progress(request_id, {"step": f"step {(step := step + 1)}"}))


def main() -> None:
    """Serve until deleted."""
    if BEHAVIOUR == "die":
        sys.exit("out of memory")
    print("started", flush=True)
    listener = socket.socket(fileno=int(DESCRIPTOR))
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client,), daemon=True).start()


if __name__ == "__main__":
    main()
