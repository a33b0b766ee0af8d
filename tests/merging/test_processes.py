"""Merges on two processes of four devices each, bit for bit as on one device.

One threshold over the whole model means sums over all devices of both.
"""

import json

import numpy as np
import pytest

from tests.merging import process_worker
from tests.merging.process_worker import CASES, SHAPE, models
from tests.processes import run_pair


@pytest.fixture(scope="module")
def found():
  """Of each case and process, what each device holds of the result."""
  said = run_pair("tests.merging.process_worker")
  return list(zip(*(json.loads(text.splitlines()[-1]) for text in said)))


@pytest.mark.parametrize(
  "number", range(len(CASES)), ids=["-".join(case[:4]) for case in CASES]
)
def test_as_on_one_device(number, found):
  name, dtype, _, how, leaves = CASES[number]
  base, others = models(dtype, leaves)
  method = process_worker.methods()[name]
  wanted = process_worker.MERGES[how](base, others, method)
  for leaf in base:
    assert 0.1 < np.mean(wanted[leaf] != base[leaf]) < 0.9
    covered = np.zeros(SHAPE, int)
    for shards in found[number]:
      assert len(shards[leaf]) == 4
      for index, digest in shards[leaf]:
        at = tuple(slice(*pair) for pair in index)
        covered[at] += 1
        bits = process_worker.digest(np.asarray(wanted[leaf])[at])
        assert bits == digest, (leaf, index)
    assert (covered == (8 if leaf == "whole" else 1)).all()
