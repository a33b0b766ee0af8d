"""Repo: the history of a value, in one folder.

    patchjax.json             what this folder is, and the version of its format
    refs/heads, refs/tags     one commit id each; refs/notes: the latest note
    logs/heads, logs/tags     one file each time one of them was moved
    objects/ab/cdef...        immutable: commits, trees, notes, patch files
    payloads/<uuid>/          plain Orbax checkpoints with their leaf index
    blobs/<sha256>            small payloads in one file
    cache/                    rebuilt at need; may be deleted

A commit writes its arrays, then its objects, then moves the ref: whenever the
process dies, every ref names a version that is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from patchjax.history.arrays import exporting, lazy, pending
from patchjax.history.commits import (
  bisecting,
  blaming,
  branching,
  graph,
  listing,
  merges,
  notes,
  proposals,
  rebasing,
  recipes,
  reverting,
)
from patchjax.history.remotes import cloning, fetching, pulling, pushing
from patchjax.history.storage import config, layout, reflog
from patchjax.history.storage.files import open_files
from patchjax.history.storage.objects import Commit, Objects
from patchjax.history.storage.refs import Refs
from patchjax.history.upkeep import fsck, gc, repack

if TYPE_CHECKING:
  from patchjax.history.arrays.index import Index
  from patchjax.history.arrays.reading import LeafReader
  from patchjax.history.arrays.writing import LeafWriter
  from patchjax.history.commits.differences import TreeDiff
  from patchjax.trees.digest import Entry

# Modules that touch arrays are imported by the methods that need them: `log`
# and `branches` start without jax, Orbax and TensorStore.


class Repo:
  """A repository of model weights.

  A reference (`ref`) is a branch, a tag, a commit id or a unique prefix of one
  (at least 4 digits), or `<branch>@{n}` (what the branch was before its last
  n moves), followed by any number of `~n` (n first parents back) and `^n` (the
  n-th parent).

  Attributes:
    path: absolute path of its folder, or its URL.
    files: the files in it.
    objects: its commits, trees and notes.
    refs: its branches and tags.

  Example:
    >>> import numpy as np
    >>> with Repo.temporary() as repo:
    ...   first = repo.commit({"w": np.float32([1, 2])}, message="start")
    ...   repo.commit({"w": np.float32([1, 3])}, message="train")[:0]
    ...   [commit.title for commit in repo.log()]
    ...   repo.checkout("main~1")["w"].tolist()
    ''
    ['train', 'start']
    [1.0, 2.0]
  """

  def __init__(self, path: str | os.PathLike[str], *, remote: bool = False):
    """Opens a repository; `Repo.init` creates one.

    Args:
      path: its folder, or `gs://bucket/path`.
      remote: opens it to be read, and copied to and from; it may lie on
        `s3://bucket/path` then, where nobody can commit.

    Raises:
      NotARepositoryError: if it is none.
      FormatError: if it was written by a newer version.
      RepositoryError: if no repository can be worked in there.
    """
    self.path = layout.place(path, remote=remote)
    self.files = open_files(self.path)
    layout.check(self.files)
    self.objects = Objects(self.files)
    self.refs = Refs(self.files, self.objects)

  @classmethod
  def init(cls, path: str | os.PathLike[str]) -> Repo:
    """Creates a repository, or opens the one that is there.

    Args:
      path: an empty or new folder, or a repository; or `gs://bucket/path`.

    Raises:
      RepositoryError: if the folder holds something else.
      OSError: if it cannot be written.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   Repo.init(folder).branches()
      {}
    """
    layout.create(open_files(layout.place(path)))
    return cls(path)

  @classmethod
  @contextlib.contextmanager
  def temporary(cls) -> Iterator[Repo]:
    """Yields a repository that is deleted at the end, for tests and notebooks.

    Example:
      >>> with Repo.temporary() as repo:
      ...   repo.tags()
      {}
    """
    with tempfile.TemporaryDirectory(prefix="patchjax-") as folder:
      yield cls.init(os.path.join(folder, "repo"))

  def __repr__(self) -> str:
    return f"Repo({self.path!r})"

  @functools.cached_property
  def index(self) -> Index:
    """Where each leaf is stored."""
    from patchjax.history.arrays.index import Index

    return Index(self.files)

  @functools.cached_property
  def reader(self) -> LeafReader:
    """Reads and verifies leaves."""
    from patchjax.history.arrays.reading import LeafReader

    return LeafReader(self.files, self.index)

  @functools.cached_property
  def writer(self) -> LeafWriter:
    """Stores leaves."""
    from patchjax.history.arrays.writing import LeafWriter

    return LeafWriter(self.files, self.index, self.reader)

  def commit(
    self,
    value: Any,
    *,
    message: str,
    branch: str | None = "main",
    author: str | None = None,
    time: datetime.datetime | float | None = None,
    parents: Sequence[str] | None = None,
    on: str | None = None,
    recipe: dict[str, Any] | None = None,
    retry: bool | int = False,
    any_base: bool = False,
  ) -> str:
    """Stores a value as a new version of a branch.

    Only leaves that changed are stored. A `jax.Array` that was committed is
    known from then on: do not write to a numpy array after `jax.device_put`
    made a `jax.Array` of it without a copy, which JAX forbids as well. The
    first commit of a repository creates its branch; other branches are created
    by `branch`, or by naming `parents`.

    With `jax.distributed`, all processes call it together with the same
    value, on a folder that all of them see: each writes its own shards of
    global arrays, process 0 records the commit, all return its id. What goes
    wrong in one is raised in all.

    Args:
      value: a pytree of arrays of any dtype of JAX (numpy arrays included),
        Python numbers and `Record`s (functions and texts are left out), or a
        `Patch`, or the path of a patch file. A patch is applied by the pinned
        evaluation of `patchjax.patches.pinned`, and kept byte for byte beside
        its result.
      message: what was done.
      branch: the branch to move. None makes a commit on `parents` that no
        ref names yet: name it with `tag`, or the next `gc` may take it.
      author: by whom; by default $PATCHJAX_AUTHOR, or user@host.
      time: when; by default now.
      parents: refs it was made from; by default the tip of the branch. The
        branch must still be at the first of them, so a value that was made
        from an old tip cannot be put on top of somebody else's work.
      on: for a patch, the ref it was made for; by default the branch's tip.
        Stands for `parents=[on]`.
      recipe: JSON-able account of how the value was computed.
      retry: what to do if somebody else moved the branch since the first
        parent. If theirs and this commit changed other leaves, both changes
        are put together and committed on top of theirs: as often as it takes
        (True), or at most so many times. Name the version that the value was
        made from in `parents`: what has happened before this call is not
        noticed otherwise.
      any_base: whether a patch may be committed on another value than it was
        made for, if the structure is the same. It must be asked for where a
        patch names another base, or where a patch file names none, as with
        `patchjax apply`; a patch in memory that names none is taken to be for
        the version it is committed on.

    Returns:
      The commit id.

    Raises:
      ConflictError: if somebody else moved the branch in the meantime; says
        who. With `retry`, if they changed the same leaves; names them.
      BaseMismatchError: if the patch was made for another value.
      StructureError: if the tree is empty or ambiguous.
      DtypeError: lists every leaf that cannot be stored.

    Example:
      >>> import numpy as np, patchjax as pj
      >>> a, b = {"w": np.float32([1, 2])}, {"w": np.float32([1, 4])}
      >>> with Repo.temporary() as repo:
      ...   first = repo.commit(a, message="start")
      ...   second = repo.commit(pj.diff(a, b), message="more", on=first)
      ...   repo.checkout(second)["w"].tolist()
      [1.0, 4.0]
    """
    from patchjax.history.commits import committing

    asked = committing.drafted(
      self,
      value,
      message=message,
      branch=branch,
      author=author,
      time=time,
      parents=parents,
      on=on,
      recipe=recipe,
      retry=retry,
      any_base=any_base,
    )
    return committing.record(self, *asked)

  def resolve(self, ref: str) -> str:
    """Returns the commit id that a ref names.

    Args:
      ref: see the class.

    Raises:
      RefNotFoundError: if it names nothing, or several commits.
    """
    return graph.resolve(ref, self.refs, self.objects)

  def show(self, ref: str = "main") -> Commit:
    """Returns a commit.

    Args:
      ref: see the class.
    """
    return self.objects.commit(self.resolve(ref))

  def tree(self, ref: str = "main") -> dict[str, Entry]:
    """Returns digest, dtype and shape of every leaf of a version.

    Args:
      ref: see the class.
    """
    return self.objects.tree(self.show(ref).tree)

  def checkout(
    self, ref: str = "main", *, like: Any = None, only: Any = None
  ) -> Any:
    """Returns the value of a version, every leaf verified by its digest.

    Args:
      ref: see the class.
      like: a pytree with the wanted structure: arrays or `ShapeDtypeStruct`s.
        Numpy leaves come back as numpy arrays, others as `jax.Array`s in the
        sharding that the leaf has, Python numbers and `Record`s as such. What
        is none of these (functions) is returned as it is.
      only: which leaves to read (see `patchjax.select`). With `like`, leaves
        not asked for are returned as they are in it.

    Returns:
      A pytree like `like`, by default nested dicts of `jax.Array`s. 64-bit
      leaves are numpy arrays unless jax_enable_x64 is set.

    Raises:
      MismatchError: if `like` has other leaves; lists every one.
      IntegrityError: if stored bits are missing or damaged; lists every leaf.
      SelectionError: if `only` picks nothing.

    Example:
      >>> import numpy as np
      >>> params = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.int8)}
      >>> with Repo.temporary() as repo:
      ...   commit = repo.commit(params, message="start")
      ...   repo.checkout(like=params, only="b")["b"].tolist()
      [1, 1]
    """
    from patchjax.history.arrays import restoring

    commit = self.show(ref)
    entries = restoring.pick(
      self.objects.tree(commit.tree), like, only, f"version {ref!r}"
    )
    return restoring.restore(self.reader, entries, like)

  def diff(self, a: str, b: str = "main") -> TreeDiff:
    """Returns what changed between two versions, leaf by leaf.

    Args:
      a: ref of the first version.
      b: ref of the second.
    """
    from patchjax.history.commits import differences

    return differences.compare(self.tree(a), self.tree(b), self.reader)

  def annotate(
    self,
    ref: str,
    kind: str,
    payload: Any,
    *,
    author: str | None = None,
    time: datetime.datetime | float | None = None,
  ) -> str:
    """Attaches a fact to a commit, whose id stays; returns the note's id.

    Args:
      ref: see the class.
      kind: what it is about, such as `verdict`.
      payload: JSON-able content, without NaN or Inf.
      author: by whom; by default as for `commit`.
      time: when; by default now.
    """
    return notes.add(
      self.objects,
      self.refs,
      self.resolve(ref),
      kind=kind,
      payload=payload,
      author=author or layout.default_author(),
      time=layout.spell_time(time),
    )

  def annotations(
    self, ref: str, kind: str | None = None
  ) -> list[dict[str, Any]]:
    """Returns the facts attached to a commit, oldest first.

    Args:
      ref: see the class.
      kind: only those of this kind.

    Returns:
      Dicts of `id`, `commit`, `kind`, `payload`, `author`, `time`.
    """
    return notes.read(self.objects, self.refs, self.resolve(ref), kind)

  # Verbs that live in modules of their own: functions of a repository.
  log = listing.log
  branches = branching.branches
  tags = branching.tags
  branch = branching.branch
  tag = branching.tag
  reset = branching.reset
  reflog = reflog.reflog
  blame = blaming.blame
  merge_base = merges.merge_base
  merge = merges.merge
  replay = recipes.replay
  revert = reverting.revert
  cherry_pick = rebasing.cherry_pick
  rebase = rebasing.rebase
  bisect = bisecting.bisect
  open = lazy.open_lazily
  commit_async = pending.commit_async
  patch_of = proposals.patch_of
  fsck = fsck.fsck
  gc = gc.gc
  repack = repack.repack
  export = exporting.export
  clone = staticmethod(cloning.clone)
  fetch = fetching.fetch
  pull = pulling.pull
  push = pushing.push
  remotes = config.remotes
  add_remote = config.add_remote
  remove_remote = config.remove_remote
