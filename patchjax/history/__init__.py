"""Versioned values: commits, branches and merges over plain checkpoints.

`Repo` is the door. What lists a history (objects, refs, graph) imports neither
jax, orbax nor tensorstore; what touches arrays is imported on first use.
"""

from typing import TYPE_CHECKING

from patchjax.trees.lazy import attach

if TYPE_CHECKING:
  from patchjax.history.arrays.state import Record as Record
  from patchjax.history.commits.differences import TreeDiff as TreeDiff
  from patchjax.history.repo import Repo as Repo
  from patchjax.history.storage.objects import Commit as Commit
  from patchjax.history.training import Checkpointer as Checkpointer
  from patchjax.history.upkeep.fsck import FsckReport as FsckReport

__getattr__, __dir__ = attach(
  __name__,
  {
    "commits.differences": "TreeDiff",
    "upkeep.fsck": "FsckReport",
    "storage.objects": "Commit",
    "repo": "Repo",
    "arrays.state": "Record",
    "training": "Checkpointer",
  },
)
