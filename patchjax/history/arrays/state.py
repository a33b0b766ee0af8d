"""Train state: leaves of a tree that are no arrays, and are data all the same.

A commit holds arrays. Python numbers are held as arrays without axes: `bool`,
`int64`, `float64` and `complex128`. Text, bytes and JSON values, as data
iterators give them for their position, are held as `uint8` arrays and stand in
a tree as `Record`s: explicitly, since a text among the leaves of a model is
rarely data. Nothing is ever pickled.

`checkout(like=)` gives each of them back as `like` has it, so that the state
of a training run (parameters, optimizer state, step, PRNG keys, position in
the data) is one value, and the next step is that of the run that was never
interrupted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchjax.trees.errors import DtypeError, FormatError

if TYPE_CHECKING:
  import numpy as np

  from patchjax.trees.digest import Entry

_BYTES = 0  # never the first byte of a JSON text


@dataclasses.dataclass(frozen=True)
class Record:
  """A leaf that is text, bytes or a JSON value.

  In a tree for `checkout(like=)` it stands for a record of any content.

  Attributes:
    value: what `encode` takes.

  Example:
    >>> import numpy as np
    >>> from patchjax.history import Record, Repo
    >>> state = {"w": np.ones(2, np.float32), "step": 7,
    ...          "data": Record({"epoch": 3, "seen": [1, 5]})}
    >>> with Repo.temporary() as repo:
    ...   commit = repo.commit(state, message="step 7")
    ...   back = repo.checkout(like={**state, "step": 0, "data": Record(None)})
    >>> back["step"], back["data"]
    (7, Record(value={'epoch': 3, 'seen': [1, 5]}))
  """

  value: Any


def encode(value: Any) -> np.ndarray:
  """Returns text, bytes or a JSON value as an array.

  Args:
    value: bytes; or a text, finite number, boolean, None, or lists and dicts
      (with text keys) of them.

  Returns:
    A `uint8` array of one axis: a zero and the bytes, or the JSON text.

  Raises:
    DtypeError: if it is anything that would not come back as it was: tuples,
      keys that are no texts, arrays, NaN.

  Example:
    >>> decode(encode({"epoch": 3})), decode(encode(b"abc"))
    ({'epoch': 3}, b'abc')
  """
  import numpy as np

  from patchjax.trees.digest import canonical_json

  if isinstance(value, bytes):
    return np.frombuffer(bytes([_BYTES]) + value, np.uint8)
  if why := _unfit(value, "value"):
    raise DtypeError(
      f"{why}; a record holds bytes, or texts, finite numbers, booleans, None, "
      "and lists and dicts (with text keys) of them. Turn tuples into lists; "
      "arrays are leaves of their own"
    )
  try:
    return np.frombuffer(canonical_json(value), np.uint8)
  except UnicodeEncodeError as error:
    raise DtypeError(f"a text of the record is no Unicode: {error}") from error


def decode(array: Any) -> Any:
  """Returns what `encode` made an array of.

  Args:
    array: a `uint8` array of one axis.

  Raises:
    FormatError: if it is not of `encode`'s making.
  """
  import numpy as np

  array = np.asarray(array)
  if array.dtype != np.uint8 or array.ndim != 1:
    raise FormatError(
      f"expected the uint8 array of a record, found {array.dtype}"
      f"{list(array.shape)}"
    )
  data = array.tobytes()
  if data[:1] == bytes([_BYTES]):
    return data[1:]
  try:
    return json.loads(data)
  except ValueError as error:
    raise FormatError(f"the array is no record: {error}") from error


def arrays(named: Mapping[str, Any]) -> dict[str, Any]:
  """Returns leaves with numbers and records as the arrays that hold them.

  Args:
    named: `{text name: leaf}`.

  Raises:
    DtypeError: lists every leaf that cannot be held.

  Example:
    >>> arrays({"step": 7, "f": max})
    {'step': array(7), 'f': <built-in function max>}
  """
  held, bad = {}, []
  for name, leaf in named.items():
    try:
      held[name] = _array(leaf)
    except (DtypeError, OverflowError) as error:
      bad.append(f"  {name}: {error}")
  if bad:
    raise DtypeError(
      f"{len(bad)} leaf/leaves cannot be committed; nothing was:\n"
      + "\n".join(bad)
    )
  return held


def expected(
  like: Mapping[str, Any], entries: Mapping[str, Entry]
) -> dict[str, Any]:
  """Returns the leaves that a version must have to be restored as `like`.

  A number takes any leaf without axes of its kind, so that a step that was
  counted on a device comes back as the `int` it started as; a record takes
  one of any length.

  Args:
    like: `{text name: leaf}` of the tree to restore.
    entries: the leaves of the version.

  Returns:
    `{text name: array or entry}`; what is no data (functions) is left out.
  """
  from patchjax.trees.digest import Entry
  from patchjax.trees.dtypes import is_array

  wanted: dict[str, Any] = {}
  for name, leaf in like.items():
    if is_array(leaf):
      wanted[name] = leaf
    elif is_data(leaf):
      found = entries.get(name)
      if found is not None and _fits(found, leaf):
        wanted[name] = found
      else:
        dtype = "uint8" if isinstance(leaf, Record) else _DTYPES[type(leaf)]
        shape = (0,) if isinstance(leaf, Record) else ()
        wanted[name] = Entry("", dtype, shape)
  return wanted


def is_data(leaf: Any) -> bool:
  """Returns whether a leaf is no array but is stored as one.

  Args:
    leaf: a leaf.

  Example:
    >>> is_data(7), is_data(Record("a")), is_data("a")
    (True, True, False)
  """
  return type(leaf) in _DTYPES or isinstance(leaf, Record)


def restored(array: Any, like: Any) -> Any:
  """Returns a stored array as the number or record that it stands for.

  Args:
    array: the array, on the host.
    like: a leaf for which `is_data`.
  """
  if isinstance(like, Record):
    return Record(decode(array))
  return type(like)(array[()])


def weak(x: Any) -> Any:
  """Returns a `jax.Array` with weak type: Python's numbers, seen by JAX.

  Its dtype gives way to that of what it meets, so a step computed with the
  strong array of the same bits would round differently.

  Args:
    x: an array of JAX's default dtype for its kind; others are returned as
      they are.
  """
  import jax
  import jax.numpy as jnp

  zero = {"i": 0, "f": 0.0, "c": 0j}.get(x.dtype.kind)
  if zero is None or jnp.asarray(zero).dtype != x.dtype:
    return x
  # JAX has no function for this: an array filled with a Python number is weak,
  # and stays so when all its entries are replaced.
  fill = jax.jit(
    lambda x: jnp.full(x.shape, zero).at[...].set(x),
    out_shardings=x.sharding if x.committed else None,
  )
  return fill(x)


def rest(entries: Mapping[str, Entry], known: Any) -> dict[str, Entry]:
  """Returns the leaves of a version without numbers that a patch leaves alone.

  Transforms pass Python numbers by, so a patch made of a tree that has some
  does not know the arrays that hold them.

  Args:
    entries: the leaves of a version.
    known: the names that the patch knows.
  """
  return {
    name: entry
    for name, entry in entries.items()
    if name in known or entry.shape != () or entry.dtype not in _DTYPES.values()
  }


_DTYPES = {
  bool: "bool",
  int: "int64",
  float: "float64",
  complex: "complex128",
}


def _array(leaf: Any) -> Any:
  if isinstance(leaf, Record):
    return encode(leaf.value)
  if type(leaf) not in _DTYPES:
    return leaf
  import numpy as np

  try:
    return np.array(leaf, _DTYPES[type(leaf)])
  except OverflowError as error:
    raise DtypeError(
      f"{leaf} does not fit into 64 bits; store it as "
      "patchjax.history.Record(number)"
    ) from error


def _fits(entry: Entry, like: Any) -> bool:
  if isinstance(like, Record):
    return entry.dtype == "uint8" and len(entry.shape) == 1
  from patchjax.trees.dtypes import KINDS

  kind = KINDS.get(entry.dtype)
  if kind is None or entry.shape != ():
    return False
  if kind.floating:
    return type(like) is (complex if kind.words == 2 else float)
  return type(like) is (bool if kind.name == "bool" else int)


def _unfit(value: Any, where: str) -> str | None:
  """Returns what JSON would not give back as it was, and where."""
  if value is None or type(value) in (bool, int, str):
    return None
  if type(value) is float:
    finite = value - value == 0
    return None if finite else f"{where} is {value}"
  if type(value) is list:
    inner = ((item, f"{where}[{i}]") for i, item in enumerate(value))
  elif type(value) is dict:
    for key in value:
      if type(key) is not str:
        return f"{where} has the key {key!r} ({type(key).__name__})"
    inner = ((item, f"{where}[{key!r}]") for key, item in value.items())
  else:
    return f"{where} is a {type(value).__name__}"
  return next((why for item, at in inner if (why := _unfit(item, at))), None)
