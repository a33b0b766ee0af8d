"""Lazy leaves: a version that is read where it is touched."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from patchjax.history.arrays.reading import LeafReader
  from patchjax.history.repo import Repo
  from patchjax.trees.digest import Entry


class LazyLeaf:
  """A stored leaf. Slices of it are read, and verified, when asked for.

  Only the tiles (of at most 1 MiB) that a slice touches are read and hashed.

  Attributes:
    name: its text name.
    entry: its digest, dtype and shape.
  """

  def __init__(self, name: str, entry: Entry, reader: LeafReader):
    self.name = name
    self.entry = entry
    self._reader = reader

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the leaf."""
    return self.entry.shape

  @property
  def ndim(self) -> int:
    """Number of its axes."""
    return len(self.entry.shape)

  @property
  def size(self) -> int:
    """Number of its entries."""
    return self.entry.size

  @property
  def dtype(self) -> Any:
    """Its dtype: numpy's, or JAX's own for PRNG keys."""
    from patchjax.history.arrays import restoring

    return restoring.dtype_of(self.entry)

  @property
  def nbytes(self) -> int:
    """Bytes that reading all of it takes."""
    from patchjax.trees.dtypes import itemsize

    return self.size * itemsize(self.entry.dtype)

  def __len__(self) -> int:
    if not self.shape:
      raise TypeError("len() of a leaf without axes")
    return self.shape[0]

  def __repr__(self) -> str:
    return f"LazyLeaf({self.name!r}, {self.entry.dtype}{list(self.shape)})"

  def read(self) -> Any:
    """Returns the whole leaf.

    Returns:
      A new numpy array; PRNG keys as a `jax.Array` of keys.

    Raises:
      IntegrityError: if its bits are missing or damaged.
    """
    return self[...]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    if copy is False:
      raise ValueError("a stored leaf cannot be an array without a copy")
    import numpy as np

    return np.asarray(self.read(), dtype)

  def __getitem__(self, index: Any) -> Any:
    """Returns a part of the leaf, as numpy's basic indexing gives it.

    Args:
      index: integers, slices with any step, `...` and None, in a tuple or
        alone.

    Raises:
      IndexError: if it is out of bounds, or no basic index.
      IntegrityError: if the bits are missing or damaged.
    """
    from patchjax.history.arrays import restoring

    region, rest = _split(index, self.shape)
    [words] = self._reader.read_regions([(self.name, self.entry, region)])
    found = restoring.stored(words, self.entry)
    return found[rest] if rest else found


class LazyTree(Mapping[str, "LazyLeaf | LazyTree"]):
  """The leaves of a version by text name; a folder's name gives its leaves.

  Attributes:
    commit: id of the commit.
  """

  def __init__(
    self, commit: str, entries: Mapping[str, Entry], reader: LeafReader
  ):
    self.commit = commit
    self._entries = dict(entries)
    self._reader = reader

  def __getitem__(self, name: str) -> LazyLeaf | LazyTree:
    if name in self._entries:
      return LazyLeaf(name, self._entries[name], self._reader)
    inside = {
      leaf.removeprefix(f"{name}/"): entry
      for leaf, entry in self._entries.items()
      if leaf.startswith(f"{name}/")
    }
    if inside:
      return LazyTree(self.commit, inside, self._reader)
    from patchjax.trees.suggest import did_you_mean

    raise KeyError(
      f"version {self.commit[:12]} has no leaf {name!r}; "
      + did_you_mean(name, self._entries)
    )

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def __repr__(self) -> str:
    return f"LazyTree({self.commit[:12]!r}, {len(self)} leaves)"


def open_lazily(repo: Repo, ref: str = "main") -> LazyTree:
  """Returns a version whose leaves are read where they are touched.

  Args:
    repo: the repository.
    ref: the version.

  Returns:
    A mapping from text names to lazy leaves. They have shape and dtype, are
    sliced as numpy arrays are, and read only the tiles that a slice touches;
    every tile is verified.

  Raises:
    RefNotFoundError: if there is no such version.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Repo
    >>> value = {"layer": {"w": np.arange(6.0).reshape(2, 3)}}
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit(value, message="start")
    ...   version = repo.open("main")
    ...   version["layer/w"].shape, version["layer"]["w"][1, ::2].tolist()
    ((2, 3), [3.0, 5.0])
  """
  commit = repo.show(ref)
  return LazyTree(commit.id, repo.objects.tree(commit.tree), repo.reader)


def _split(
  index: Any, shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[Any, ...]]:
  """Returns the region to read, and the index to take of it."""
  items = index if isinstance(index, tuple) else (index,)
  axes = sum(item is not None and item is not Ellipsis for item in items)
  if axes > len(shape):
    raise IndexError(f"{axes} indices for {len(shape)} axes")
  if sum(item is Ellipsis for item in items) > 1:
    raise IndexError("an index can have one ellipsis only")
  region: list[slice] = []
  rest: list[Any] = []
  for item in items:
    if item is None:
      rest.append(None)
    elif item is Ellipsis:
      for length in shape[len(region) : len(region) + len(shape) - axes]:
        region.append(slice(0, length))
        rest.append(slice(None))
    else:
      held, inner = _along(item, shape[len(region)], len(region))
      region.append(held)
      rest.append(inner)
  region += [slice(0, length) for length in shape[len(region) :]]
  return tuple(region), tuple(rest)


def _along(item: Any, length: int, axis: int) -> tuple[slice, Any]:
  """Returns what to read along one axis, and the index to take of that."""
  if isinstance(item, slice):
    steps = range(*item.indices(length))
    if not len(steps):
      return slice(0, 0), slice(None)
    first, last = min(steps[0], steps[-1]), max(steps[0], steps[-1])
    return slice(first, last + 1), slice(steps[0] - first, None, steps.step)
  if isinstance(item, bool):
    raise IndexError("lazy leaves take basic indices: integers and slices")
  try:
    at = operator.index(item)
  except TypeError as error:
    raise IndexError(
      "lazy leaves take basic indices (integers, slices, ..., None); found "
      f"{type(item).__name__}: read() the leaf first"
    ) from error
  if not -length <= at < length:
    raise IndexError(f"index {at} is out of bounds for axis {axis}: {length}")
  at %= length
  return slice(at, at + 1), 0
