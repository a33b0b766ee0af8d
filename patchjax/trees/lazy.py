"""Packages whose modules are imported on first use (PEP 562).

What lists a history must start without jax, so a package that holds both
light and heavy modules may import neither in its `__init__`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
  package: str, home: Mapping[str, str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """Returns the `__getattr__` and `__dir__` of a package with lazy names.

  Args:
    package: its `__name__`.
    home: `{module below the package: names it holds, with spaces between}`.
      No module may be called as one of the names: importing it would bind the
      module under the name of its function.
    modules: modules below the package that are names themselves.

  Example:
    >>> getattr_, dir_ = attach("patchjax.trees", {"names": "join split"})
    >>> dir_(), getattr_("join")(("a", "b"))
    (['join', 'split'], 'a/b')
  """
  where = {name: module for module in home for name in home[module].split()}

  def find(name: str) -> Any:
    if name in modules:
      return importlib.import_module(f"{package}.{name}")
    if name not in where:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(f"{package}.{where[name]}")
    value = getattr(module, name)
    # The next use finds it without asking.
    setattr(sys.modules[package], name, value)
    return value

  return find, lambda: sorted({*where, *modules})
