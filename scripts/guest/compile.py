"""Compile the Python files below a directory, in a process of its own because marshal's bytes depend on it.

marshal writes a back reference for a string that anything else in the process refers to as well, so the same
source gives the same bytes only in a process that did the same things before. This one only compiles.
"""

import importlib.util
import marshal
import sys
from pathlib import Path

UNCHECKED_HASH = 0b01  # PEP 552: hash-based, never compared with the source


def main(root: Path, sources_stay: str) -> None:
    """Replace every x.py below root by x.pyc; below `sources_stay` add it in __pycache__ instead."""
    for path in sorted(root.rglob("*.py")):
        guest_path = "/" + str(path.relative_to(root))
        source = path.read_bytes()
        code = compile(source, guest_path, "exec", dont_inherit=True, optimize=0)
        head = (
            importlib.util.MAGIC_NUMBER
            + UNCHECKED_HASH.to_bytes(4, "little")
            + importlib.util.source_hash(source)
        )
        if guest_path.startswith(sources_stay):
            target = Path(importlib.util.cache_from_source(str(path)))
            target.parent.mkdir(exist_ok=True)
        else:
            target = path.with_suffix(".pyc")
            path.unlink()
        target.write_bytes(head + marshal.dumps(code))


main(Path(sys.argv[1]), sys.argv[2])
