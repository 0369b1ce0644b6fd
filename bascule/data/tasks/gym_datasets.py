"""reasoning-gym's datasets by name, importing only the part of the library that holds the one asked for.

`import reasoning_gym` runs all its hundred families, and through them sympy, matplotlib and more: 1.3 s of processor time, which every
worker of a run and every test that starts one would pay. Each family lies in a category (`reasoning_gym/arithmetic/chain_sum.py`), and
a category imports alone when the package's own `__init__` is passed over.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = "reasoning_gym"
_LOCK = threading.Lock()


def create(name: str, *, seed: int, size: int, **settings: Any) -> Any:
    """A dataset of the family `name`: item i is `dataset[i]`, its judge `dataset.score_answer`. Raises KeyError when there is none."""
    kind(name)
    return _factory().create_dataset(name, seed=seed, size=size, **settings)


def kind(name: str) -> tuple[Any, Any]:
    """(class of the dataset, dataclass of its settings). Raises KeyError when reasoning-gym has no family of that name."""
    with _LOCK:
        if _PACKAGE not in sys.modules:
            found = _of_its_category(name)
            if found is not None:
                return found
    return _all()[name]  # type: ignore[no-any-return]


def names() -> list[str]:
    """Every family. Imports all of reasoning-gym."""
    return list(_all())


def _all() -> Any:
    importlib.import_module(_PACKAGE)
    return _factory().DATASETS


def _factory() -> Any:
    return importlib.import_module(f"{_PACKAGE}.factory")


def _of_its_category(name: str) -> tuple[Any, Any] | None:
    """None where no file has the family's name, or importing its category alone does not register it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return None
    [folder] = spec.submodule_search_locations
    files = list(Path(folder).glob(f"*/**/{name}.py")) if name.isidentifier() else []
    if len(files) != 1:
        return None
    category = files[0].relative_to(folder).parts[0]
    bare = ModuleType(_PACKAGE)
    bare.__path__, bare.__spec__ = [folder], spec
    sys.modules[_PACKAGE] = bare
    try:
        # coaching and factory import each other, and only this way round works.
        importlib.import_module(f"{_PACKAGE}.coaching")
        importlib.import_module(f"{_PACKAGE}.{category}")
        return _factory().DATASETS.get(name)  # type: ignore[no-any-return]
    finally:
        # A later `import reasoning_gym` gets the real package; the parts that are loaded stay and are not run twice.
        del sys.modules[_PACKAGE]
