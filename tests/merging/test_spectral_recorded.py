"""What the authors' codes answered, as recorded in tests/golden."""

import functools
import inspect
import pathlib

import numpy as np
import pytest

import patchjax as pj
from patchjax.patches import Delta, LowRank
from tests.reference import merging_spectral as reference

PATH = pathlib.Path(__file__).parents[1] / "golden" / "spectral.npz"
TASKS = 3
m = pj.merging
CASES = {
  "tsv_m": {},
  "iso_c": {},
  "iso_cts": {},
  "wudi": {"solver": "adam", "others": "mean"},
  "star": {},
  "svc": {},
  "svc_paper": {"formula": "paper"},
  "knots": {},
}


@functools.cache
def arrays():
  with np.load(PATH) as file:
    return dict(file)


def under(prefix):
  return {
    name.removeprefix(prefix): x
    for name, x in arrays().items()
    if name.startswith(prefix)
  }


def close(found, expected, what, bound=1e-6):
  atol = bound * np.max(np.abs(expected))
  np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=what)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_code(case):
  answers = under(f"{case}/")
  tasks = [under(f"task/{i}/") for i in range(TASKS)]
  tasks = [{name: task[name] for name in answers} for task in tasks]
  base = {name: np.zeros_like(x) for name, x in tasks[0].items()}
  name, options = case.removesuffix("_paper"), CASES[case]
  wanted = getattr(reference, name)(base, tasks, layout="out_in", **options)
  found = pj.merge(base, tasks, getattr(m, name)(layout="out_in", **options))
  assert set(answers) >= {"up", "down"}
  for leaf, answer in answers.items():
    close(wanted[leaf], answer, f"reference: {leaf}")
    # Orthonormal bases of directions that nearly depend on each other are as
    # sure as float32 tells these apart.
    close(found[leaf], answer, f"patchjax: {leaf}", 2e-5)


@pytest.mark.parametrize(
  ("case", "method"),
  [
    ("core_tsv_m", m.tsv_m()),
    ("core_ties", m.ties(scope="leaf", density=0.3)),
  ],
  ids=["tsv_m", "ties"],
)
def test_core_space_equals_the_authors_code(case, method):
  def patch(i):
    factors = under(f"lora/{i}/")  # outputs by inputs: here it is b first
    code = LowRank(factors["b"], factors["a"], np.float32(1))
    return pj.Patch({"w": Delta(code, "add")})

  found = m.core_space([patch(i) for i in range(TASKS)], method=method)
  close(found.deltas["w"].code.dense(), under(f"{case}/")["w"], case, 2e-5)


def test_defaults_are_those_of_the_recorded_calls():
  for name, wanted in {
    "iso_cts": {"common": 0.8},
    "star": {"eta": 40.0},
    "wudi": {"iterations": 300, "learning_rate": 1e-5},
    "svc": {"alpha": 0.1},
  }.items():
    parameters = inspect.signature(getattr(m, name)).parameters
    assert {key: parameters[key].default for key in wanted} == wanted
