"""Figures without a display: made, styled, and written to files."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
  """Returns an empty matplotlib Figure that belongs to no window.

  Args:
    width: in inches.
    height: in inches.

  Raises:
    ImportError: if matplotlib is not installed; says how to install it.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      "pictures need matplotlib: pip install 'patchjax[viz]'"
    ) from error
  # Not pyplot: it keeps every figure, and asks for a display.
  return Figure(figsize=(width, height), dpi=120, layout="constrained")


def shortened(text: str, width: int) -> str:
  """Returns a name that is cut in its middle if it is too long.

  Args:
    text: the name.
    width: the largest number of characters.

  Example:
    >>> shortened("encoder/layers_0/attention/query/kernel", 20)
    'encoder/l…ery/kernel'
  """
  if len(text) <= width:
    return text
  head = (width - 1) // 2
  return text[:head] + "…" + text[len(text) - (width - 1 - head) :]
