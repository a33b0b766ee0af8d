"""Orders, ranges, merge bases, names and blame, against slow definitions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchjax.history import Repo
from patchjax.history.commits import graph
from patchjax.trees import errors
from tests.history import graphs


@pytest.fixture(scope="module")
def shared():
  with Repo.temporary() as repo:
    yield repo


@given(graphs.dags())
def test_children_come_first_and_nothing_twice(shared, dag):
  parents, times = dag
  ids = graphs.build(shared, parents, times=times)
  names = {commit: name for name, commit in ids.items()}
  tip = list(parents)[-1]
  found = [names[c.id] for c in graph.walk([ids[tip]], shared.objects)]
  assert len(found) == len(set(found))
  assert set(found) == graphs.reachable(parents, [tip])
  at = {name: i for i, name in enumerate(found)}
  assert all(at[name] < at[p] for name in found for p in parents[name])
  if all(times[p] < times[n] for n in found for p in parents[n]):
    assert [-times[n] for n in found] == sorted(-times[n] for n in found)


@given(graphs.dags(), st.data())
def test_ranges_are_differences_of_sets(shared, dag, data):
  parents, times = dag
  ids = graphs.build(shared, parents, times=times)
  a, b = (data.draw(st.sampled_from(list(parents))) for _ in range(2))
  expected = graphs.reachable(parents, [b]) - graphs.reachable(parents, [a])
  found = shared.log(f"{ids[a]}..{ids[b]}")
  assert {c.message for c in found} == expected
  assert shared.log([ids[b], f"^{ids[a]}"]) == found
  assert shared.log(f"{ids[a]}..{ids[b]}", limit=2) == found[:2]


@given(graphs.dags(), st.data())
def test_merge_bases_and_ancestry(shared, dag, data):
  parents, times = dag
  ids = graphs.build(shared, parents, times=times)
  tips = data.draw(
    st.lists(st.sampled_from(list(parents)), min_size=2, max_size=4)
  )
  before = {name: graphs.reachable(parents, [name]) for name in parents}
  common = set.intersection(*(before[tip] for tip in tips))
  best = {
    name for name in common if not any(name in before[c] - {c} for c in common)
  }
  found = graph.merge_bases([ids[tip] for tip in tips], shared.objects)
  assert found == sorted(ids[name] for name in best)
  for a, b in itertools.product(tips, repeat=2):
    assert graph.is_ancestor(ids[a], ids[b], shared.objects) == (a in before[b])


@given(graphs.dags(most=8), st.data())
def test_blame_and_names(shared, dag, data):
  """Each leaf is traced alone, from parent to parent that has the same."""
  parents, times = dag
  texts = st.sampled_from("ab")
  leaves = {
    name: {
      leaf: data.draw(texts) for leaf in ("x/u", "x/v", "y") if leaf != "y" or i
    }
    for i, name in enumerate(parents)
  }
  ids = graphs.build(shared, parents, leaves, times)
  tip = list(parents)[-1]

  def trace(name, leaf):
    for parent in parents[name]:
      if leaves[parent].get(leaf) == leaves[name][leaf]:
        return trace(parent, leaf)
    return name

  expected = {leaf: trace(tip, leaf) for leaf in sorted(leaves[tip])}
  found = shared.blame(ids[tip])
  assert {leaf: c.message for leaf, c in found.items()} == expected
  some = shared.blame(ids[tip], only="x/.*")
  assert some == {leaf: c for leaf, c in found.items() if leaf[0] == "x"}

  def of_x(name):
    return [leaves[name].get(leaf) for leaf in ("x/u", "x/v")]

  def listed(name, seen):
    """What git lists: past a parent with the same leaves, to it alone."""
    if name in seen:
      return
    seen[name] = False
    values = {
      n: {k: v for k, v in leaves[n].items() if k[0] == "x"} for n in ids
    }
    same = [p for p in parents[name] if values[p] == values[name]]
    seen[name] = not same
    for parent in same[:1] or parents[name]:
      listed(parent, seen)

  seen = {}
  listed(tip, seen)
  commits = shared.log(ids[tip], name="x/.*")
  assert {c.message for c in commits} == {
    n for n, shown in seen.items() if shown
  }


def test_only_what_is_asked_for_is_read(monkeypatch):
  with Repo.temporary() as repo:
    line = {str(i): [str(i - 1)] if i else [] for i in range(100)}
    sides = {"left": ["50"], "right": ["50"], "both": ["left", "right"]}
    times = {name: 200 + i for i, name in enumerate(sides)}
    ids = graphs.build(repo, {**line, **sides}, times=times)
    read = []
    slow = repo.objects.read
    monkeypatch.setattr(
      repo.objects, "read", lambda name: read.append(name) or slow(name)
    )
    graphs.point(repo, "main", ids["99"])
    assert len(repo.log(limit=10)) == 10
    assert len(read) <= 11
    read.clear()
    repo.objects.forget()
    assert repo.merge_base(ids["left"], ids["right"]) == ids["50"]
    assert len(read) <= 5
    read.clear()
    repo.objects.forget()
    assert len(repo.log(f"{ids['50']}..{ids['both']}")) == 3
    assert len(read) <= 5
    read.clear()
    repo.objects.forget()
    assert not graph.is_ancestor(ids["99"], ids["both"], repo.objects)
    assert len(read) <= 8


def test_blame_looks_only_into_folders_that_differ(monkeypatch):
  with Repo.temporary() as repo:
    names = [f"layer{i}/{leaf}" for i in range(20) for leaf in "ab"]
    leaves = {"0": dict.fromkeys(names, "0")}
    for i in range(1, 20):
      leaves[str(i)] = {**leaves[str(i - 1)], f"layer{i}/a": "new"}
    line = {str(i): [str(i - 1)] if i else [] for i in range(20)}
    ids = graphs.build(repo, line, leaves)
    read = []
    slow = repo.objects.read
    monkeypatch.setattr(
      repo.objects, "read", lambda name: read.append(name) or slow(name)
    )
    found = repo.blame(ids["19"])
    assert found["layer7/a"].message == "7" and found["layer7/b"].message == "0"
    # A commit, its root and the one folder that it changed.
    assert len(read) < 20 * 3 + 25


def test_names_that_are_no_regex_and_ranges_that_are_none():
  with Repo.temporary() as repo:
    ids = graphs.build(repo, {"a": []})
    graphs.point(repo, "main", ids["a"])
    with pytest.raises(errors.SelectionError, match="no regex"):
      repo.log(name="(")
    with pytest.raises(errors.RefNotFoundError, match=r"a\.\.b"):
      repo.log("main...main")
    assert repo.log("main..main") == []
    with pytest.raises(errors.SelectionError):
      repo.blame(only="absent")
