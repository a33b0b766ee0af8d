"""The ledger counts what the notes of a repository hold."""

import dataclasses

import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.trees.errors import RefNotFoundError
from patchjax.vetting import Policy, Suite, Test, gate, record, uses
from patchjax.vetting.ledger import verdicts

SUITE = Suite("s", "1", [Test("t", lambda p: np.asarray(p["w"]) > 0)])
OTHER = Suite("s", "2", [Test("t", lambda p: np.asarray(p["w"]) > 0)])


def params(positive):
  w = -np.ones(300, np.float32)
  w[:positive] = 1.0
  return {"w": w}


def test_counts_distinct_comparisons_of_this_suite_on_every_branch():
  with Repo.temporary() as repo:
    repo.commit(params(200), message="base")
    repo.branch("side")
    repo.commit(params(210), message="better")
    repo.commit(params(100), message="worse", branch="side")
    assert uses(repo, SUITE) == 0

    good = gate(repo.checkout("main~1"), repo.checkout("main"), SUITE)
    record(repo, "main", good)
    assert uses(repo, SUITE) == 1
    record(repo, "main", good)  # the same evidence again is no new look
    record(repo, "main", dataclasses.replace(good, used=5))
    assert uses(repo, SUITE) == 1

    bad = gate(repo.checkout("main~1"), repo.checkout("side"), SUITE)
    record(repo, "side", bad)
    assert uses(repo, SUITE) == 2
    # Another policy on the same outcomes is a look of its own.
    loose = gate(
      repo.checkout("main~1"),
      repo.checkout("side"),
      SUITE,
      Policy(margin=0.5, flips=None),
    )
    record(repo, "side", loose)
    assert uses(repo, SUITE) == 3 and uses(repo, OTHER) == 0

    assert verdicts(repo, "side") == [bad, loose]
    assert uses(Repo(repo.path), SUITE) == 3
    shown = gate(repo.checkout("main~1"), repo.checkout("main"), SUITE, used=3)
    assert "use 4 of 32" in str(shown)


def test_other_notes_do_not_matter():
  with Repo.temporary() as repo:
    repo.commit(params(200), message="base")
    repo.annotate("main", "review", {"schema": "free text"})
    assert uses(repo, SUITE) == 0 and verdicts(repo, "main") == []
    with pytest.raises(RefNotFoundError):
      record(repo, "absent", gate(params(200), params(200), SUITE))
