"""Orbax checkpoints of whatever origin, and directories of their steps.

Both of Orbax's APIs write a pytree into a folder with a `_METADATA` file: the
checkpoint itself, or one of its items (`default`, `state`, ...) beside others
that are JSON. Both keep the steps of a run as folders of one directory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchjax.history import Record
from patchjax.trees.dtypes import device
from patchjax.trees.errors import FormatError
from patchjax.trees.names import named_leaves, nested

_MARKS = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_PYTREE = "_METADATA"
_METRICS = "metrics"
_STEP = re.compile(r"(?:[A-Za-z][\w-]*_)?(\d+)")

# What Orbax and TensorStore raise at missing or damaged files; Orbax trusts
# the types in its own metadata.
_ERRORS = (
  ArithmeticError,
  AssertionError,
  AttributeError,
  LookupError,
  OSError,
  RuntimeError,
  TypeError,
  ValueError,
)


@dataclasses.dataclass(frozen=True)
class Step:
  """One step of a directory of checkpoints.

  Attributes:
    number: its number.
    path: its folder.
    stamp: when it was written, in nanoseconds since 1970.
    metrics: its metrics by name.
  """

  number: int
  path: pathlib.Path
  stamp: int
  metrics: dict[str, Any]


def is_checkpoint(path: pathlib.Path) -> bool:
  """Returns whether a folder is an Orbax checkpoint, or a pytree in one.

  Args:
    path: the folder.
  """
  if any((path / name).is_file() for name in (_PYTREE, *_MARKS)):
    return True
  # Old versions leave no mark beside the items.
  return any(not _STEP.fullmatch(name) for name in _pytrees(path))


def steps(path: pathlib.Path) -> list[Step]:
  """Returns the finished steps in a directory, in order.

  Args:
    path: directory of a `CheckpointManager` or a `training.Checkpointer`.

  Raises:
    FormatError: if two of its folders are one step.
  """
  found: dict[int, pathlib.Path] = {}
  for child in sorted(path.iterdir()):
    # The names of unfinished ones have a suffix.
    match = _STEP.fullmatch(child.name)
    if match is None or not child.is_dir() or not is_checkpoint(child):
      continue
    number = int(match[1])
    if number in found:
      raise FormatError(
        f"{path}: step {number} is there twice, as {found[number].name} and "
        f"{child.name}; import the two one by one"
      )
    found[number] = child
  return [
    Step(number, folder, _stamp(folder), _metrics(folder))
    for number, folder in sorted(found.items())
  ]


def read(path: pathlib.Path) -> Any:
  """Returns what a checkpoint holds, with arrays on the host.

  Args:
    path: folder of a checkpoint, or of a pytree in one.

  Returns:
    The pytree as Orbax rebuilds it (dicts and lists); if there are several
    items, a dict of them, those that are JSON as `Record`s; metrics are left
    out. What patchjax exported comes back with all its dtypes.

  Raises:
    FormatError: if it cannot be read.
  """
  if (path / _PYTREE).is_file():
    return _mend(path, _load(path))
  items: dict[str, Any] = {name: _load(path / name) for name in _pytrees(path)}
  for child in sorted(path.iterdir()):
    if child.name in (_METRICS, *items) or not child.is_dir():
      continue
    if not (child / "metadata").is_file():
      raise FormatError(
        f"{path}: the item {child.name!r} is neither a pytree nor JSON; read "
        f"one that is: {', '.join(f'{path}/{name}' for name in items) or '-'}"
      )
    items[child.name] = Record(_json(child / "metadata"))
  if not items:
    raise FormatError(f"{path}: the Orbax checkpoint holds no pytree")
  if len(items) > 1:
    return items
  (tree,) = items.values()
  return _mend(path, tree)


def _pytrees(path: pathlib.Path) -> list[str]:
  return sorted(c.name for c in path.iterdir() if (c / _PYTREE).is_file())


def _load(path: pathlib.Path) -> Any:
  """Reads one pytree as it was saved: 64 bits, Python numbers, PRNG keys."""
  import jax
  import orbax.checkpoint as ocp
  from etils import epath

  # The handler below both APIs: `v1.load` wants to know more than is known of
  # a checkpoint of others (it refuses booleans, and makes bits of PRNG keys).
  handler = ocp.PyTreeCheckpointHandler()
  logger = logging.getLogger("absl")
  disabled, logger.disabled = logger.disabled, True
  try:
    folder = epath.Path(path.resolve())
    kinds = handler.metadata(folder).tree
    arguments = jax.tree.map(
      lambda kind: ocp.RestoreArgs(
        restore_type=None if _is_scalar(kind) else np.ndarray
      ),
      kinds,
    )
    tree = handler.restore(
      folder, args=ocp.args.PyTreeRestore(restore_args=arguments)
    )
    return _with_keys(path, tree)
  except _ERRORS as error:
    text = (str(error).splitlines() or [type(error).__name__])[0][:300]
    raise FormatError(
      f"{path} is not a readable Orbax checkpoint: {text}"
    ) from error
  finally:
    logger.disabled = disabled
    handler.close()


def _is_scalar(kind: Any) -> bool:
  import orbax.checkpoint as ocp

  values = (ocp.metadata.ScalarMetadata, ocp.metadata.StringMetadata)
  return isinstance(kind, values)


def _with_keys(path: pathlib.Path, tree: Any) -> Any:
  """Returns a tree with PRNG keys where Orbax saved such."""
  import jax

  implementations = {}
  for file in sorted((path / "array_metadatas").glob("process_*")):
    for each in _json(file)["array_metadatas"]:
      facts = each["array_metadata"]
      impl = (facts.get("ext_metadata") or {}).get("random_key_impl")
      if impl is not None:
        implementations[facts["param_name"]] = impl
  if not implementations:
    return tree
  found, treedef = jax.tree_util.tree_flatten_with_path(tree)
  leaves = []
  for keys, leaf in found:
    # Orbax names a leaf by its keys with dots between them.
    name = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
    impl = implementations.get(name)
    leaves.append(
      leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
    )
  return jax.tree.unflatten(treedef, leaves)


def _mend(path: pathlib.Path, tree: Any) -> Any:
  """Gives an exported version the leaves back that Orbax cannot hold."""
  remarks = _facts(path).get("custom_metadata") or {}
  if not ("commit" in remarks and "zero_size" in remarks):
    return tree
  named = tree if remarks.get("flat") else named_leaves(tree)
  named = dict(named)
  try:
    for name, dtype in remarks["words"].items():
      named[name] = device(named[name], dtype)
    for name, entry in remarks["zero_size"].items():
      named[name] = _empty(entry)
    return nested(named)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise FormatError(
      f"{path}: what patchjax noted on its export does not fit the arrays "
      f"({error!r}); export the version again"
    ) from error


def _empty(entry: Mapping[str, Any]) -> Any:
  from patchjax.history.arrays.reading import empty
  from patchjax.trees.digest import Entry

  dtype = entry["dtype"]
  return device(empty(Entry("", dtype, tuple(entry["shape"]))), dtype)


def _facts(path: pathlib.Path) -> dict[str, Any]:
  file = path / _MARKS[0]
  return _json(file) if file.is_file() else {}


def _stamp(path: pathlib.Path) -> int:
  facts = _facts(path)
  times = [facts.get(f"{what}_timestamp_nsecs") for what in ("init", "commit")]
  return max(
    (time for time in times if isinstance(time, int)),
    default=path.stat().st_mtime_ns,
  )


def _metrics(path: pathlib.Path) -> dict[str, Any]:
  file = path / _METRICS / _METRICS
  found = _json(file) if file.is_file() else {}
  return found if isinstance(found, dict) else {}


def _json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise FormatError(f"{path}: expected JSON ({error})") from error
