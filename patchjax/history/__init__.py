"""Versioned values: commits, branches and merges over plain checkpoints.

`Repo` is the door. What lists a history (objects, refs, graph) imports neither
jax, orbax nor tensorstore; what touches arrays is imported on first use.
"""

from typing import TYPE_CHECKING

from patchjax.trees.lazy import attach

if TYPE_CHECKING:
  from patchjax.history.differences import TreeDiff as TreeDiff
  from patchjax.history.fsck import FsckReport as FsckReport
  from patchjax.history.objects import Commit as Commit
  from patchjax.history.repo import Repo as Repo
  from patchjax.history.state import Record as Record
  from patchjax.history.training import Checkpointer as Checkpointer

__getattr__, __dir__ = attach(
  __name__,
  {
    "differences": "TreeDiff",
    "fsck": "FsckReport",
    "objects": "Commit",
    "repo": "Repo",
    "state": "Record",
    "training": "Checkpointer",
  },
)
