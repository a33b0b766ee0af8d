"""Per-example outcomes of one model on a suite: computed once, re-used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.trees.digest import canonical_json
from patchjax.trees.errors import FormatError

_SCHEMA = "patchjax/outcomes/1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
  """What a model scored on every example of every test of a suite.

  Made by `Suite.run` or `Suite.outcomes`, which check them; a gate compares
  two of them. Keep those of a release: each candidate is then evaluated once
  and the release never again.

  Attributes:
    suite: name and version of the suite, `name@version`.
    digest: digest of the suite.
    values: by test name, float64 outcomes [n], higher is better.
    subject: tree id of the model's values, or "" if it is not known.

  Example:
    >>> outcomes = Outcomes(
    ...     suite="s@1", digest="0" * 64, values={"t": np.array([0.0, 1.0])})
    >>> outcomes
    Outcomes(suite='s@1', subject='', t: n=2 mean=0.500)
  """

  suite: str
  digest: str
  values: Mapping[str, np.ndarray]
  subject: str = ""

  def __repr__(self) -> str:
    tests = ", ".join(
      f"{name}: n={x.size} mean={np.mean(x):.3f}"
      for name, x in self.values.items()
    )
    return (
      f"Outcomes(suite={self.suite!r}, subject={self.subject[:12]!r}, {tests})"
    )

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the outcomes as one safetensors file, atomically.

    0/1 outcomes take a byte each, others eight. The header carries the suite,
    the subject and a digest of everything, checked by `load`.

    Args:
      path: the file; replaced if it exists.

    Raises:
      OSError: if the file cannot be written; nothing is left behind then.
    """
    from safetensors.numpy import save

    arrays = {name: _compact(x) for name, x in self.values.items()}
    header = {
      "schema": _SCHEMA,
      "suite": self.suite,
      "digest": self.digest,
      "subject": self.subject,
      # safetensors orders tensors by dtype and name, a suite by its own mind.
      "tests": list(arrays),
    }
    header["content"] = _content(header, arrays)
    data = save(arrays, metadata={"patchjax": canonical_json(header).decode()})
    path = os.fspath(path)
    fd, partial = tempfile.mkstemp(
      dir=os.path.dirname(path) or ".", prefix=".outcomes-"
    )
    try:
      with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    except BaseException:
      os.unlink(partial)
      raise

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> Outcomes:
    """Reads what `save` wrote.

    Args:
      path: the file.

    Raises:
      FormatError: if it is no such file, is truncated, was edited, or is of a
        version that this patchjax does not know.
      OSError: if it cannot be read.
    """
    import safetensors

    path = os.fspath(path)
    with open(path, "rb"):
      pass  # a missing file is the caller's FileNotFoundError, with its path
    try:
      with safetensors.safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("patchjax")
        arrays = {name: file.get_tensor(name) for name in file.keys()}
      header = json.loads(text) if text is not None else None
    except (safetensors.SafetensorError, ValueError) as error:
      raise FormatError(
        f"{path} is not a readable file of outcomes ({error}): run the suite "
        "again and save its outcomes anew"
      ) from error
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
      found = header.get("schema") if isinstance(header, dict) else "nothing"
      raise FormatError(
        f"{path}: expected outcomes of schema {_SCHEMA!r}, found {found!r}; "
        "they may be of a newer patchjax"
      )
    content = header.pop("content", None)
    tests = header.get("tests")
    if not isinstance(tests, list) or sorted(map(str, tests)) != sorted(arrays):
      raise FormatError(f"{path}: its tests are not those of its header")
    arrays = {name: arrays[name] for name in tests}
    if content != _content(header, arrays):
      raise FormatError(
        f"{path}: the content is not what its digest says, so it was damaged "
        "or edited: run the suite again and save its outcomes anew"
      )
    return cls(
      suite=header["suite"],
      digest=header["digest"],
      subject=header["subject"],
      values={name: x.astype(np.float64) for name, x in arrays.items()},
    )


def _compact(x: np.ndarray) -> np.ndarray:
  whole = bool(np.all((x == 0) | (x == 1)))
  return np.ascontiguousarray(x, np.uint8 if whole else np.float64)


def _content(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
  hasher = hashlib.sha256(canonical_json(header))
  for x in arrays.values():
    hasher.update(canonical_json([str(x.dtype), list(x.shape)]))
    hasher.update(x.astype(x.dtype.newbyteorder("<")).tobytes())
  return hasher.hexdigest()
