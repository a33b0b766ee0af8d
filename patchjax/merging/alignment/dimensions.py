"""Which axes share a dimension: equations between sizes, solved by union-find.

An axis of an array is described by its *factors*, the first varying slowest: a
flattened axis of 12 heads of 64 numbers has two. A factor is a dimension, or
an integer: a run of that many entries that are all equal, as broadcasting
makes them. A dimension may turn out to be the same as another (`unify`), to be
made of two (an axis that is cut by a reshape), or to be bound to its order
(`pin`), because something reads its entries by their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Label = tuple["Dimension | int", ...]


class MisalignedError(Exception):
  """Two factorings of an axis have no common refinement."""


class Dimension:
  """An unknown: a size, and what is found out about it.

  Attributes:
    size: how many entries.
    parent: the dimension it turned out to be, if any.
    parts: the dimensions it is made of, slowest first, if any.
    reason: why its entries must stay in their order, if they must.
    doubt: why nobody knows whether they must: a primitive without a rule.
  """

  def __init__(self, size: int, reason: str | None = None):
    self.size = size
    self.parent: Dimension | None = None
    self.parts: tuple[Dimension, ...] = ()
    self.reason = reason
    self.doubt: str | None = None

  def root(self) -> Dimension:
    """Returns the dimension that stands for all that are the same."""
    found = self
    while found.parent is not None:
      found = found.parent
    return found


def size_of(factor: Dimension | int) -> int:
  """Returns how many entries a factor has."""
  return factor if isinstance(factor, int) else factor.size


def expand(label: Iterable[Dimension | int]) -> list[Dimension | int]:
  """Returns a label in terms of dimensions that are not made of others."""
  found: list[Dimension | int] = []
  for factor in label:
    if isinstance(factor, int):
      found.append(factor)
      continue
    root = factor.root()
    found += expand(root.parts) if root.parts else [root]
  return found


def free(size: int) -> Label:
  """Returns the label of an axis along which all entries are equal."""
  # Shapes in equations are now and then NumPy's integers.
  return () if size == 1 else (int(size),)


def fixed(size: int, reason: str) -> Label:
  """Returns the label of an axis whose entries must stay in their order."""
  return () if size == 1 else (Dimension(int(size), reason),)


def pin(label: Label, reason: str, *, proven: bool = True) -> Label:
  """Binds an axis to the order of its entries.

  Args:
    label: of the axis.
    reason: why.
    proven: whether that is known, or only feared.

  Returns:
    the label.
  """
  for factor in expand(label):
    if isinstance(factor, Dimension):
      if proven:
        factor.reason = factor.reason or reason
      else:
        factor.doubt = factor.doubt or reason
  return label


def unify(x: Label, y: Label) -> Label:
  """Returns the label of an axis that is aligned with both.

  Args:
    x: label of an axis.
    y: label of an axis of the same size.

  Raises:
    MisalignedError: if one is cut where the other cannot be.

  Example:
    >>> flat, heads, each = Dimension(6), Dimension(2), Dimension(3)
    >>> unify((flat,), (heads, each)) == tuple(expand((flat,)))
    True
  """
  xs, ys = expand(x)[::-1], expand(y)[::-1]
  out: list[Dimension | int] = []
  while xs and ys:
    a, b = _pop(xs), _pop(ys)
    if size_of(a) != size_of(b):
      least = min(size_of(a), size_of(b))
      if a is b or max(size_of(a), size_of(b)) % least:
        raise MisalignedError
      a, b = _first(a, least, xs), _first(b, least, ys)
    out.append(_join(a, b))
  if xs or ys:
    raise MisalignedError
  return tuple(out)


def regroup(labels: Sequence[Label], sizes: Sequence[int]) -> list[Label]:
  """Returns the labels of the axes of an array that was reshaped.

  Args:
    labels: of the axes before.
    sizes: of the axes after.

  Raises:
    MisalignedError: if an axis is cut where it cannot be.

  Example:
    >>> flat = Dimension(6)
    >>> heads, each = regroup([(flat,)], (2, 3))
    >>> [part.size for part in flat.parts], heads == (flat.parts[0],)
    ([2, 3], True)
  """
  if 0 in sizes:
    return [free(size) for size in sizes]
  left = expand(factor for label in labels for factor in label)[::-1]
  found: list[Label] = []
  for need in map(int, sizes):
    out: list[Dimension | int] = []
    while need > 1:
      factor = _pop(left)
      size = size_of(factor)
      if need % size and size % need:
        raise MisalignedError
      if size > need:
        factor = _first(factor, need, left)
      out.append(factor)
      need //= size_of(factor)
    found.append(tuple(out))
  return found


def _pop(stack: list[Dimension | int]) -> Dimension | int:
  """Returns the next factor, cut up if it was cut meanwhile."""
  factor = stack.pop()
  if isinstance(factor, int):
    return factor
  stack += expand((factor,))[::-1]
  return stack.pop()


def _first(
  factor: Dimension | int, size: int, rest: list[Dimension | int]
) -> Dimension | int:
  """Cuts a factor at `size`; what is left of it goes back to the stack."""
  whole = size_of(factor)
  if whole == size:
    return factor
  if isinstance(factor, int):
    rest.append(whole // size)
    return size
  parts = (Dimension(size), Dimension(whole // size))
  for part in parts:
    part.reason, part.doubt = factor.reason, factor.doubt
  factor.parts = parts
  rest.append(parts[1])
  return parts[0]


def _join(a: Dimension | int, b: Dimension | int) -> Dimension | int:
  if isinstance(a, int):
    return b
  if isinstance(b, int):
    return a
  a, b = a.root(), b.root()
  if a is not b:
    b.parent = a
    a.reason, a.doubt = a.reason or b.reason, a.doubt or b.doubt
  return a
