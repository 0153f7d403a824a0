"""Bring links, addresses, routes and neighbours of a network namespace to what is wanted, over rtnetlink.

pyroute2's own `__init__` imports every protocol that it knows, which takes twice the time of what is needed
here; so an empty package of the same path stands in for it before anything below it is imported.
"""

import sys
from importlib.machinery import PathFinder
from types import ModuleType


def _seed_pyroute2() -> None:
    spec = PathFinder.find_spec("pyroute2")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")
    package = ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["pyroute2"] = package


if "pyroute2" not in sys.modules:
    _seed_pyroute2()
