"""merge_files: merges of models that do not fit in memory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from patchjax.merging import inputs
from patchjax.merging.streaming import (
  cutting,
  journal,
  layout,
  majority,
  showing,
)
from patchjax.merging.streaming.reading import Reader
from patchjax.patches import engine
from patchjax.patches.transform import Transform
from patchjax.trees.dtypes import host


@dataclasses.dataclass(frozen=True)
class MergedFiles:
  """What `merge_files` did.

  Attributes:
    paths: the files that were written; of a model in shards, the index last.
    read: bytes of arrays that were read.
    written: bytes of arrays of the result.
    resumed: bytes of it that an earlier process had written.
  """

  paths: tuple[pathlib.Path, ...]
  read: int
  written: int
  resumed: int


def merge_files(
  base: Any,
  contributors: Sequence[Any],
  method: Transform | Mapping[Any, Transform],
  out: Any,
  *,
  state: Any = None,
  only: Any = None,
  dtype: Any = None,
  out_dtype: Any = None,
  shard_bytes: int | None = None,
  progress: bool | None = None,
) -> MergedFiles:
  """Merges models that do not fit in memory, leaf by leaf.

  The numbers are those that `merge` gives for the loaded parameters: the same
  bits, but for methods that sum floats over a leaf. In memory are the arrays
  of one leaf: at most k + 3 times the largest, beside what the process needs
  anyway (a patch counts as float32, and stays mapped). The models are read
  once, and before that for what is counted over the whole tree: a cut by rank
  (`trim`) takes two reads, a sum one. The majority sign of `ties` is found in
  the two of its trim, unless very many entries tie about there.

  A merge that was killed goes on where it was: cuts found and files written
  stay in a hidden folder beside the result, and are used if inputs, method,
  numbers and options are the same. What is unfinished never looks complete.

  Args:
    base: a safetensors file; the index of a model in shards, or the folder
      with one; `Repo.open(ref)`, or another mapping from text names to what
      has shape and dtype and is sliced as an array; or a pytree of arrays.
      None for a method that needs no base: structure and leaves that are not
      merged are then those of the first contributor.
    contributors: the same, or patches on the base, or patch files.
    method: a transform with a reducing step, or a mapping of selectors to
      transforms; see `merge`. `per_leaf(abstract_of(base), rules)` makes
      numbers that differ by leaf.
    out: a name ending in `.safetensors`, or a folder, which gets
      `model.safetensors` or shards and their index. It is replaced as a
      whole, or not at all, and gets the base's keys, metadata and order.
    state: see `merge`.
    only: selector of the leaves to merge, on text names; the others stay the
      base's.
    dtype: that floating point leaves are cast to before anything is computed;
      by default they stay as they are. They may then differ between models.
    out_dtype: that of floating point leaves of the result; by default
      `dtype`, else the base's. There is one rounding, from float32 to it.
    shard_bytes: bytes of a shard at most, unless a leaf is larger; by default
      5 GiB in a folder, and one file where a file is asked for.
    progress: whether to show a progress bar; by default on a terminal.

  Returns:
    What was written and read.

  Raises:
    BaseMismatchError: if a patch was made for another base.
    ConflictError: if another process merges into the same place.
    DtypeError: if safetensors cannot hold a leaf.
    FormatError: if a file is malformed, truncated, or changes meanwhile.
    MismatchError: if a model does not fit the base; lists every leaf.
    NonFiniteError: if NaN or Inf is found; nothing is written then.
    OSError: if a file cannot be read or written, or the room is too small.
    StructureError: if there is no base, and something needs it.
    ValueError: if the method has no reducing step, an option is none, or the
      result would overwrite what is read.

  Example:
    >>> import tempfile, numpy as np, patchjax as pj
    >>> from patchjax.interop.files import read, write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   paths = [f"{folder}/{i}.safetensors" for i in range(4)]
    ...   for path, x in zip(paths, (0, 1, 3)):
    ...     write(path, {"w": np.float32([x])})
    ...   mean = pj.merging.linear()
    ...   done = merge_files(paths[0], paths[1:3], mean, paths[3])
    ...   read(paths[3])["w"].tolist(), done.written
    ([2.0], 4)
  """
  single = not isinstance(method, Mapping)
  methods = {None: method} if single else method
  states = {None: state} if single else state or {}
  reader = Reader(
    base,
    contributors,
    methods,
    only,
    layout.dtype_named(dtype),
    layout.dtype_named(out_dtype),
  )
  out = pathlib.Path(out)
  plan = layout.layout_of(
    out, reader.leaves, reader.base.keys, reader.base.metadata, shard_bytes
  )
  _check_apart(plan, reader)
  parts = journal.parts_of(
    models=journal.unknown(reader.identity),
    method=[
      (repr(key), repr(one.spec), one.numbers, states.get(key))
      for key, one in methods.items()
    ],
    options=(repr(only), repr(dtype), repr(out_dtype)),
    files=[(s.path.name, s.header.hex(), s.ends) for s in plan.shards],
    software=(jax.__version__, jax.default_backend()),
  )
  with showing.bar(progress) as bar:
    reader.moved = bar.moved
    groups = [
      _Group(str(i), methods[key], states.get(key), leaves, reader)
      for i, (key, leaves) in enumerate(inputs.grouped(reader.floats, methods))
    ]
    reader.check_base()
    holders = reader.check_rest()
    with journal.journal_of(plan, parts) as record:
      resumed = record.resumed
      if not record.placing:
        _write(plan, record, groups, holders, reader, bar)
      paths = tuple(record.place())
  return MergedFiles(paths, bar.read, plan.total, resumed)


class _Group:
  """The leaves that are merged by one method."""

  def __init__(self, key, method, state, leaves, reader):
    self._key = key
    self._method = method
    self._state = state
    self._reader = reader
    self._shapes = {name: tuple(x.shape) for name, x in leaves.items()}
    self.names = reader.touched(leaves)
    self._how = {"contributors": reader.contributors, "as_params": True}

  def bytes_of(self, names: Sequence[str]) -> int:
    """Returns how many bytes it takes to read leaves once."""
    return self._reader.bytes_of(names, self._method)

  def count(self, record: journal.Journal, bar: showing.Bar) -> list[Any]:
    """Returns what is counted over all leaves of the group."""

    def find(plan, index, items, start, passes):
      key = f"{self._key}:{index}"
      if (known := record.cut(key, start)) is not None:
        return known
      by_rank = cutting.applies(plan, index)
      bar.say("finding cuts" if by_rank else "counting")
      bar.plan((2 if by_rank else 1) * self.bytes_of(self.names))
      if not by_rank:
        carry = passes(start)
      elif majority.applies(plan, index):
        votes = majority.Votes(plan, index, self._reader.contributors)
        carry = cutting.cut(plan, index, items, start, passes, votes)
        if (more := votes.difference(carry)) is not None:
          # What the next stage will ask for.
          record.found(f"{self._key}:{index + 1}", np.asarray(more > 0))
      else:
        carry = cutting.cut(plan, index, items, start, passes)
      record.found(key, jax.device_get(carry))
      return carry

    works = self._reader.works(self.names, self._method)
    return engine.count(
      self._method, self._state, works, self._shapes, find=find, **self._how
    )

  def results(
    self, names: Sequence[str], shared: Sequence[Any]
  ) -> Iterator[tuple[str, Any]]:
    """Yields the merged leaves among some names, in their order."""
    held = set(self.names)
    works = self._reader.works([n for n in names if n in held], self._method)
    return engine.run(
      self._method,
      self._state,
      works,
      self._shapes,
      streamed=True,
      dtype=self._reader.dtype,
      shared=shared,
      **self._how,
    )


def _write(
  plan: layout.Layout,
  record: journal.Journal,
  groups: Sequence[_Group],
  holders: Mapping[str, int],
  reader: Reader,
  bar: showing.Bar,
) -> None:
  """Writes what is not yet written of all files."""
  left = [
    (shard, names, end)
    for shard in plan.shards
    for names, end in shard.portions()
    if end > record.done(shard)
  ]
  if not left:
    return
  due = {name for _, names, _ in left for name in names}
  for group in groups:
    bar.plan(group.bytes_of([n for n in group.names if n in due]))
  shared = [group.count(record, bar) for group in groups]
  bar.say("merging")
  for shard in plan.shards:
    portions = [(names, end) for s, names, end in left if s is shard]
    if not portions:
      continue
    with record.growing(shard) as file:
      for names, end in portions:
        for words in _arrays(names, groups, shared, holders, reader):
          file.write(words)
          del words  # memory for the next
        record.keep(shard, file, end)


def _arrays(
  names: Sequence[str],
  groups: Sequence[_Group],
  shared: Sequence[Sequence[Any]],
  holders: Mapping[str, int],
  reader: Reader,
) -> Iterator[memoryview]:
  """Yields the bytes of leaves of the result."""
  running = [
    group.results(names, found)
    for group, found in zip(groups, shared, strict=True)
  ]
  of = {n: results for g, results in zip(groups, running) for n in g.names}
  for name in names:
    if name in of:
      yield np.ascontiguousarray(host(next(of[name])[1])[0]).data
    else:
      array = reader.untouched(name, holders.get(name))
      yield np.ascontiguousarray(host(array)[0]).data
  # The last check of each comes after its last leaf: before these bytes are
  # made to stay.
  for results in running:
    for _ in results:
      raise AssertionError("more results than leaves")


def _check_apart(plan: layout.Layout, reader: Reader) -> None:
  """Refuses to overwrite what is read: a merge could not be resumed."""
  made = {shard.path.absolute() for shard in plan.shards}
  both = sorted(made & reader.paths)
  if both:
    raise ValueError(f"{both[0]} is read by this merge: write elsewhere")
