"""bisect finds the first bad commit of any graph, in few tests."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from patchjax.history import Repo
from patchjax.history.commits import bisecting
from patchjax.trees import errors
from tests.history import graphs


@pytest.fixture(scope="module")
def shared():
  with Repo.temporary() as repo:
    yield repo


@given(graphs.dags(most=16, roots=1), st.data())
def test_the_first_bad_commit_of_any_graph(shared, dag, data):
  parents, times = dag
  ids = graphs.build(shared, parents, times=times)
  tip = list(parents)[-1]
  reached = graphs.reachable(parents, [tip])
  culprit = data.draw(st.sampled_from(sorted(reached)))
  assume(culprit != "0")
  bad = {n for n in reached if culprit in graphs.reachable(parents, [n])}
  others = sorted(reached - {tip, "0"})
  some = st.sets(st.sampled_from(others)) if others else st.just(set())
  skipped = data.draw(st.one_of(st.just(set()), some))

  def ask(commit):
    if commit.message in skipped:
      return "skip"
    return "bad" if commit.message in bad else "good"

  found = bisecting.search(shared, ids["0"], ids[tip], ask)
  assert culprit in {commit.message for commit in found.candidates}
  assert len({commit.id for commit, _ in found.steps}) == len(found.steps)
  left = {commit.message for commit in found.candidates}
  if found.first is not None:
    assert found.first.message == culprit
  else:
    assert len(left) > 1
    last = [n for n in left if n not in skipped]
    assert len(last) <= 1  # the earliest known to be bad; all else is skipped
  if not skipped:
    assert found.first is not None


@pytest.mark.parametrize("count", [2, 3, 100, 1000])
def test_a_line_takes_the_logarithm(shared, count):
  line = {str(i): [str(i - 1)] if i else [] for i in range(count)}
  ids = graphs.build(shared, line)
  for culprit in {1, count // 3 or 1, count - 1}:
    seen = []

    def ask(commit, culprit=culprit):
      return "bad" if int(commit.message) >= culprit else "good"

    found = bisecting.search(
      shared,
      ids["0"],
      ids[str(count - 1)],
      ask,
      progress=lambda *step, seen=seen: seen.append(step),
    )
    assert found.first is not None and found.first.message == str(culprit)
    assert len(found.steps) <= math.ceil(math.log2(count))
    assert [made for made, _, _ in seen] == list(range(len(found.steps)))


def test_good_and_bad_on_different_branches(shared):
  parents = {"r": [], "m": ["r"], "good": ["m"], "x": ["m"], "bad": ["x"]}
  ids = graphs.build(shared, parents)
  asked = []

  def ask(commit, broken=("x", "bad")):
    asked.append(commit.message)
    return "bad" if commit.message in broken else "good"

  found = bisecting.search(shared, ids["good"], ids["bad"], ask)
  assert found.first is not None and found.first.message == "x"
  assert asked[0] == "m"  # what both came from is tested first
  with pytest.raises(errors.RepositoryError, match="something was mended"):
    bisecting.search(
      shared, ids["good"], ids["bad"], lambda c: ask(c, ("r", "m", "bad"))
    )
  with pytest.raises(errors.RepositoryError, match="exchanged"):
    bisecting.search(shared, ids["bad"], ids["m"], ask)


def test_with_parameters():
  with Repo.temporary() as repo:
    for i in range(6):
      params = {"w": np.float32([i]), "big": np.zeros(5, np.float32)}
      repo.commit(params, message=f"step {i}")
    like = {"w": np.zeros(1, np.float32)}
    seen = []

    def test(params, commit):
      seen.append((sorted(params), commit.title))
      assert isinstance(params["w"], np.ndarray)
      return None if commit.title == "step 3" else bool(params["w"][0] < 3)

    found = repo.bisect(["main~5", "main~4"], "main", test, like=like, only="w")
    assert {name for names, _ in seen for name in names} == {"w"}
    assert [c.title for c in found.candidates] == ["step 3", "step 4"]
    assert "could be any of these" in str(found)
    spelled = found.to_json()
    assert spelled["first"] is None and len(spelled["steps"]) == len(seen)
    found = repo.bisect(
      "main~5",
      "main",
      lambda repo, commit: (
        "w" in repo.tree(commit.id) and commit.title < "step 2"
      ),
      load=False,
    )
    assert str(found).endswith("is the first bad commit: step 2")
