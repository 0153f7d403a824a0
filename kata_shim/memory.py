"""What a process remembers to be quick, and how it gives back to the host what a large request took."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache
from typing import TypeVar

_T = TypeVar("_T")
_remembered: list[_lru_cache_wrapper[object]] = []


def remember(most: int) -> Callable[[Callable[..., _T]], _lru_cache_wrapper[_T]]:
    """Decorate a pure function: its last `most` results are remembered, until `give_back`."""

    def decorate(function: Callable[..., _T]) -> _lru_cache_wrapper[_T]:
        found = lru_cache(maxsize=most)(function)
        _remembered.append(found)
        return found

    return decorate


def give_back() -> None:
    """Let the kernel have what is free, in 10 ms; for when something large has been let go of.

    One object that lives on keeps the whole MiB that Python took for it and its neighbours, and the C library
    keeps what lies below its last block in use.
    """
    for each in _remembered:
        each.cache_clear()
    gc.collect()  # which also empties Python's lists of objects to be used again
    ctypes.CDLL(None).malloc_trim(0)
