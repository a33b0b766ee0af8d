"""Versioned values: commits, branches and merges over plain checkpoints.

`Repo` is the door. What lists a history (objects, refs, graph) imports neither
jax, orbax nor tensorstore; what touches arrays is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from patchjax.history.differences import TreeDiff as TreeDiff
  from patchjax.history.fsck import FsckReport as FsckReport
  from patchjax.history.objects import Commit as Commit
  from patchjax.history.repo import Repo as Repo

_HOME = {
  "Commit": "objects",
  "FsckReport": "fsck",
  "Repo": "repo",
  "TreeDiff": "differences",
}


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_HOME[name]}")
  value = globals()[name] = getattr(module, name)
  return value


def __dir__() -> list[str]:
  return sorted(_HOME)
