"""msgpack as flax writes it: `flax.serialization.to_bytes` and its like."""

from __future__ import annotations

import pathlib
from typing import Any

from patchjax.trees.errors import FormatError


def read(path: pathlib.Path) -> Any:
  """Returns the tree in a msgpack file of flax: nested dicts.

  Args:
    path: the file.

  Raises:
    FormatError: if it is malformed, or flax is not installed.
  """
  try:
    import msgpack
    from flax import serialization
  except ImportError as error:
    raise FormatError(
      f"{path} looks like flax's msgpack, and flax is not installed: "
      "pip install flax"
    ) from error
  try:
    tree = serialization.msgpack_restore(path.read_bytes())
  except (
    msgpack.exceptions.UnpackException,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:
    # What it finds in the file is what flax computes with, unchecked.
    raise FormatError(
      f"{path} is not a readable msgpack of flax ({error}); get the file again"
    ) from error
  if not isinstance(tree, dict):
    raise FormatError(
      f"{path}: expected a msgpack of nested dicts, as flax writes it, found "
      f"a {type(tree).__name__}"
    )
  return tree
