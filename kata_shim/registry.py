"""Which sandboxes there are in a root of state: their directories, and what an id or its beginning means.

Standard library only, and quick to import: whoever calls lives for milliseconds.

    <root>/sandboxes/<id>/   shim.sock  the shim listens here          lock      taken by who starts a shim
                             shim.log   its stdout and stderr          record.json   what the sandbox owns
    <root>/containers/<id>   a link to the sandbox of a container that has not its sandbox's own id
    <root>/factory/          zygote.sock   where a process listens, if the factory runs, that forks shims
"""

from __future__ import annotations

import os

from kata_shim.errors import ShimError

DEFAULT_ROOT = "/run/kata-shim"
MAX_ID = 64

_ID_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"


def is_id(text: str) -> bool:
    """Tell whether `text` is a sandbox id: 1 to 64 of A-Z a-z 0-9 _ . - and neither "." nor ".."."""
    return 0 < len(text) <= MAX_ID and not text.strip(_ID_CHARACTERS) and text not in (".", "..")


def sandbox_directory(root: str, sandbox_id: str) -> str:
    """Return the directory of a sandbox under the root of state."""
    return f"{root}/sandboxes/{sandbox_id}"


def check_root(root: str) -> bool:
    """Return whether the root of state exists; raises ShimError if someone else could have written to it."""
    try:
        status = os.stat(root)
    except FileNotFoundError:
        return False
    if status.st_uid != os.geteuid():
        raise ShimError("permission-denied", f"{root}: belongs to uid {status.st_uid}, not to the caller's")
    if status.st_mode & 0o022:
        mode = status.st_mode & 0o7777
        raise ShimError("permission-denied", f"{root}: mode {mode:o} lets group or others write into it")
    return True


def list_ids(root: str) -> list[str]:
    """Return the ids of all sandboxes, sorted. Raises ShimError as `check_root` does."""
    if not check_root(root):
        return []
    try:
        names = os.listdir(f"{root}/sandboxes")
    except FileNotFoundError:
        return []
    return sorted(name for name in names if is_id(name))


def claim(root: str, sandbox_id: str) -> os.stat_result:
    """Make the directory of a new sandbox, mode 0700, which makes the id the caller's; return what it is.

    Raises ShimError: `invalid-argument` for what is no id, `already-exists` where another has it.
    """
    if not is_id(sandbox_id):
        rule = f"1 to {MAX_ID} of A-Z a-z 0-9 _ . - (and . and .. are none)"
        raise ShimError("invalid-argument", f"id: {sandbox_id} is not {rule}")
    os.makedirs(root, 0o700, exist_ok=True)
    check_root(root)
    os.makedirs(f"{root}/sandboxes", 0o700, exist_ok=True)
    try:
        os.mkdir(sandbox_directory(root, sandbox_id), 0o700)
    except FileExistsError:
        raise ShimError("already-exists", f"id: {sandbox_id} is in use") from None
    return os.stat(sandbox_directory(root, sandbox_id))


def remove(root: str, sandbox_id: str) -> None:
    """Remove the directory of a sandbox that owns nothing: no shim has written a record for it.

    Raises ShimError `failed-precondition` where there is a record, since only a shim can clear what it lists,
    and where something is mounted below it.
    """
    directory = sandbox_directory(root, sandbox_id)
    if os.path.lexists(f"{directory}/record.json"):
        raise ShimError("failed-precondition", f"{sandbox_id} still owns what {directory}/record.json lists")
    from kata_shim.removal import remove_tree

    try:
        remove_tree(directory)
    except OSError as error:
        where = error.filename or directory
        raise ShimError("failed-precondition", f"{sandbox_id}: {where}: {error.strerror}") from None


def resolve(root: str, prefix: str) -> str:
    """Return the id of the sandbox that `prefix` means, by its own id or by that of a container in it.

    Raises ShimError as `resolve_container`.
    """
    return resolve_container(root, prefix)[0]


def resolve_container(root: str, prefix: str) -> tuple[str, str]:
    """Return a sandbox's id, and the id of a container in it, "" if it is the sandbox that is meant.

    `prefix` is an id, or else the beginning of only one. Raises ShimError in the words of the documented
    system: `Missing container ID`, `no such container ID (x)` and `multiple containers found (x)`.
    """
    if not prefix:
        raise ShimError("invalid-argument", "Missing container ID")
    if is_id(prefix) and check_root(root) and os.path.isdir(sandbox_directory(root, prefix)):
        return prefix, ""
    containers = _list_containers(root)
    if prefix in containers:
        return containers[prefix], prefix
    found = [(name, "") for name in list_ids(root) if name.startswith(prefix)]
    found += [(sandbox, name) for name, sandbox in containers.items() if name.startswith(prefix)]
    if not found:
        raise ShimError("not-found", f"no such container ID ({prefix})")
    if len(found) > 1:
        raise ShimError("failed-precondition", f"multiple containers found ({prefix})")
    return found[0]


def _list_containers(root: str) -> dict[str, str]:
    """Return the containers that have not their sandbox's own id: id -> the sandbox's."""
    found = {}
    directory = f"{root}/containers"
    if check_root(root) and os.path.isdir(directory):
        for name in os.listdir(directory):
            try:
                sandbox = os.path.basename(os.readlink(f"{directory}/{name}"))
            except FileNotFoundError:
                continue  # it has just been given back
            if os.path.isdir(sandbox_directory(root, sandbox)):
                found[name] = sandbox
    return found
