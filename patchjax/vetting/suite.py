"""Suites: named, versioned sets of tests with slices declared beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from patchjax.trees.digest import canonical_json
from patchjax.trees.errors import VetError
from patchjax.trees.suggest import list_names
from patchjax.vetting.outcomes import Outcomes


@dataclasses.dataclass(frozen=True, eq=False)
class Test:
  """One metric with an outcome for every example.

  Attributes:
    name: without "/": a slice is addressed as `test/slice`.
    evaluate: a function of the parameters that returns the outcomes, [n]: 1
      and 0 for right and wrong, or real numbers of which higher is better
      (negate a loss). The same examples in the same order at every call.
    protected: whether a candidate must be non-inferior here. Other tests are
      reported and decide nothing unless the gain on them is claimed.
    slices: named subsets of the examples, declared before any result is seen:
      boolean masks [n] or integer indices. Each is protected like its test:
      an average hides what happens to a minority.
    clusters: group of each example, [n], if examples come in groups that rise
      and fall together (questions about one document).
    data: what identifies the examples, such as the sha256 of their file; part
      of the suite's digest.

  Example:
    >>> accuracy = Test("sign", lambda p: p["w"] > 0, slices={"first": [0, 1]})
    >>> accuracy.evaluate({"w": np.array([1.0, -1.0, 2.0])})
    array([ True, False,  True])
  """

  # pytest collects classes of this name.
  __test__ = False

  name: str
  evaluate: Callable[[Any], Any]
  _: dataclasses.KW_ONLY
  protected: bool = True
  slices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  clusters: Any = None
  data: str = ""

  def __post_init__(self) -> None:
    _check_name("test", self.name)
    if not callable(self.evaluate):
      raise VetError(
        f"test {self.name!r}: evaluate must be a function of the parameters, "
        f"got {type(self.evaluate).__name__}"
      )
    slices = {}
    for name, members in self.slices.items():
      _check_name(f"slice of test {self.name!r}", name)
      slices[name] = _members(f"{self.name}/{name}", members)
    object.__setattr__(self, "slices", slices)
    if self.clusters is not None:
      clusters = np.asarray(self.clusters)
      if clusters.ndim != 1:
        raise VetError(
          f"test {self.name!r}: clusters must hold one group an example, [n]; "
          f"found shape {clusters.shape}"
        )
      object.__setattr__(self, "clusters", clusters)

  def fits(self, n: int) -> None:
    """Checks that slices and clusters are of n examples.

    Args:
      n: number of examples.

    Raises:
      VetError: naming the slice, with the expected and the found number.
    """
    for name, members in self.slices.items():
      if members.dtype == np.bool_ and members.size != n:
        raise VetError(
          f"slice '{self.name}/{name}': the mask has {members.size} entries "
          f"and the test {n} examples; give one entry an example"
        )
      if members.dtype != np.bool_ and int(members.max()) >= n:
        raise VetError(
          f"slice '{self.name}/{name}': index {int(members.max())} is out of "
          f"the {n} examples of the test"
        )
    if self.clusters is not None and self.clusters.size != n:
      raise VetError(
        f"test {self.name!r}: {self.clusters.size} clusters for {n} examples; "
        "give one group an example"
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Suite:
  """A named and versioned set of tests.

  Attributes:
    name: name of the suite.
    version: its version; change it whenever a test, a slice or the data does.
    tests: the tests, in the order of the reports.

  Example:
    >>> suite = Suite("signs", "1.0.0", [Test("sign", lambda p: p["w"] > 0)])
    >>> suite.run({"w": np.array([1.0, -1.0], np.float32)}, subject="")
    Outcomes(suite='signs@1.0.0', subject='', sign: n=2 mean=0.500)
  """

  name: str
  version: str
  tests: Sequence[Test]

  def __post_init__(self) -> None:
    object.__setattr__(self, "tests", tuple(self.tests))
    if not self.name or not self.version:
      raise VetError(
        f"a suite needs a name and a version, got {self.name!r} and "
        f"{self.version!r}"
      )
    if not self.tests:
      raise VetError(f"suite {self.name!r} has no tests: give at least one")
    names = [test.name for test in self.tests]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise VetError(
        f"suite {self.name!r}: two tests are called {list_names(twice)}; "
        "rename one"
      )

  @property
  def label(self) -> str:
    """`name@version`."""
    return f"{self.name}@{self.version}"

  @property
  def digest(self) -> str:
    """64 hex digits over the declaration: what is tested, not with what code.

    Names, version, protection, members of slices and clusters, and what each
    test says of its data. The code of `evaluate` is not part of it (a digest
    of code would change with a comment): a new version says that it changed.
    """
    tests = [
      {
        "name": test.name,
        "protected": test.protected,
        "data": test.data,
        "slices": {k: _array_digest(v) for k, v in test.slices.items()},
        "clusters": None
        if test.clusters is None
        else _array_digest(np.unique(test.clusters, return_inverse=True)[1]),
      }
      for test in self.tests
    ]
    return hashlib.sha256(
      canonical_json(
        {"name": self.name, "version": self.version, "tests": tests}
      )
    ).hexdigest()

  def __getitem__(self, name: str) -> Test:
    for test in self.tests:
      if test.name == name:
        return test
    raise VetError(
      f"suite {self.label} has no test {name!r}; it has "
      + list_names(test.name for test in self.tests)
    )

  def run(
    self, params: Any, *, subject: str | None = None, progress: bool = False
  ) -> Outcomes:
    """Evaluates every test.

    Args:
      params: what the tests' `evaluate` take, as a rule a pytree of arrays.
      subject: tree id of the values, if it is known already or `params` is no
        pytree of arrays (""). By default it is computed, so that the evidence
        names the very bits that were tested.
      progress: whether to show a progress bar on stderr.

    Returns:
      The outcomes, checked.

    Raises:
      VetError: if a test's outcomes are of a wrong shape, empty, not finite,
        or do not fit its slices.
    """
    if subject is None:
      from patchjax.trees.digest import tree_id

      subject = tree_id(params)
    tests: Any = self.tests
    if progress:
      from tqdm import tqdm

      tests = tqdm(self.tests, desc=self.label, unit="test", leave=False)
    # An accelerator may still be busy with one test when the next is sent;
    # `outcomes` waits. A progress bar has to wait for each.
    found = {}
    for test in tests:
      found[test.name] = test.evaluate(params)
      if progress:
        found[test.name] = np.asarray(found[test.name])
    return self.outcomes(found, subject=subject)

  def outcomes(
    self, values: Mapping[str, Any], *, subject: str = ""
  ) -> Outcomes:
    """Checks outcomes that were computed elsewhere and keys them to the suite.

    Args:
      values: outcomes by test name, [n] each.
      subject: tree id of the values they are of, if known.

    Raises:
      VetError: as `run`, and for missing or unknown tests.
    """
    names = [test.name for test in self.tests]
    missing = [name for name in names if name not in values]
    extra = [name for name in values if name not in names]
    if missing or extra:
      raise VetError(
        f"suite {self.label}: outcomes are missing for "
        f"{list_names(missing)} and unknown are {list_names(extra)}; expected "
        f"exactly {list_names(names)}"
      )
    checked = {}
    for test in self.tests:
      x = _outcome_array(test.name, values[test.name])
      test.fits(x.size)
      checked[test.name] = x
    return Outcomes(
      suite=self.label, digest=self.digest, values=checked, subject=subject
    )


def _check_name(what: str, name: Any) -> None:
  if not isinstance(name, str) or not name or "/" in name:
    raise VetError(
      f"the name of a {what} must be a text without '/', got {name!r}"
    )


def _members(where: str, members: Any) -> np.ndarray:
  """A slice as a boolean mask or as sorted indices, not empty."""
  x = np.asarray(members)
  if x.size == 0 or (x.dtype == np.bool_ and not x.any()):
    raise VetError(f"slice {where!r} has no examples: drop it or mend its mask")
  if x.ndim != 1:
    raise VetError(
      f"slice {where!r}: expected a mask or indices [n], found shape {x.shape}"
    )
  if x.dtype == np.bool_:
    return x
  if not np.issubdtype(x.dtype, np.integer):
    raise VetError(
      f"slice {where!r}: expected booleans or integers, found {x.dtype}"
    )
  if int(x.min()) < 0 or np.unique(x).size != x.size:
    raise VetError(
      f"slice {where!r}: indices must be different and not negative"
    )
  return np.sort(x).astype(np.int64)


def _array_digest(x: np.ndarray) -> str:
  """Digest of a mask or of whole numbers, whatever width they came in."""
  kind = "mask" if x.dtype == np.bool_ else "index"
  data = x.astype("|u1" if kind == "mask" else "<i8").tobytes()
  return hashlib.sha256(kind.encode() + data).hexdigest()


def _outcome_array(name: str, value: Any) -> np.ndarray:
  x = np.asarray(value)
  if x.ndim != 1 or x.size == 0:
    raise VetError(
      f"test {name!r}: expected one outcome an example, shape [n] with n >= 1; "
      f"found shape {x.shape}: return per-example outcomes, not their mean"
    )
  # By the cast, not by the kind: bfloat16 is no number to numpy's eyes.
  if np.iscomplexobj(x) or not np.can_cast(x.dtype, np.float64, "same_kind"):
    raise VetError(
      f"test {name!r}: expected numbers or booleans, found {x.dtype}"
    )
  x = x.astype(np.float64)
  bad = np.flatnonzero(~np.isfinite(x))
  if bad.size:
    raise VetError(
      f"test {name!r}: {bad.size} of {x.size} outcomes are not finite, the "
      f"first is {x[bad[0]]} at example {bad[0]}; a model that yields NaN "
      "there is not to be averaged: mend it, or score such examples as failed"
    )
  return x
