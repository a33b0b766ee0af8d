"""The kinds of statistics, and where each holds its arrays."""

from __future__ import annotations

from typing import Any

from patchjax.statistics.factors import Gram, KFac
from patchjax.statistics.fisher import Fisher

ARRAYS: dict[type, tuple[str, ...]] = {
  Fisher: ("values",),
  Gram: ("values",),
  KFac: ("inputs", "outputs"),
}


def arrays_of(statistic: Any) -> tuple[str, ...]:
  """Returns the names of a statistic's fields of arrays by leaf.

  Args:
    statistic: a `Fisher`, `Gram` or `KFac`.

  Raises:
    TypeError: if it is none of these.

  Example:
    >>> arrays_of(Fisher({}, 1, "exact"))
    ('values',)
  """
  found = ARRAYS.get(type(statistic))
  if found is None:
    raise TypeError(
      f"expected a Fisher, Gram or KFac, got {type(statistic).__name__}"
    )
  return found
