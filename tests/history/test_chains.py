"""Chains of differences: found by the leaves they meet, whatever is noted."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from patchjax.history import Repo
from patchjax.history.arrays import blobs, chains, index
from patchjax.history.arrays.index import Location
from patchjax.trees import errors
from patchjax.trees.digest import canonical_json
from tests.history.remote_cases import equal, value

LEAVES = "abcdef"


def place(digest, base, pack, depth=0):
  encoding = "dense" if base is None else "sparse"
  return Location(digest, pack, digest, encoding, base, depth)


def readable(places):
  """All leaves that can be read, by brute force."""
  found = set()
  while True:
    more = {
      digest
      for digest, some in places.items()
      if any(p.base is None or p.base in found for p in some)
    }
    if more == found:
      return found
    found = more


@st.composite
def indices(draw):
  bases = st.one_of(st.none(), st.sampled_from(LEAVES + "x"))
  return {
    digest: [
      place(digest, base, f"payloads/{digest}{i}", draw(st.integers(0, 9)))
      for i, base in enumerate(draw(st.lists(bases, max_size=3)))
    ]
    for digest in LEAVES
  }


@hypothesis.given(indices())
def test_a_chain_is_found_where_there_is_one(places):
  """Indices may be entangled as they like, and note any depth."""
  fine = readable(places)
  for digest in LEAVES:
    chain = chains.chain(digest, places)
    assert (chain is not None) == (digest in fine)
    if chain is None:
      assert chains.explain(digest, places)
      continue
    assert chain[0].digest == digest and chain[-1].base is None
    assert [p.base for p in chain[:-1]] == [p.digest for p in chain[1:]]
    assert len({p.digest for p in chain}) == len(chain)
    assert chains.depth(digest, places) >= len(chain) - 1
  routes = chains.routes(LEAVES, places)
  assert routes.keys() == fine
  for digest in fine:
    assert list(chains.along(digest, routes))[-1].base is None


@hypothesis.given(indices(), st.sampled_from(LEAVES))
def test_a_chain_avoids_what_it_must(places, avoided):
  without = {d: () if d == avoided else some for d, some in places.items()}
  for digest in set(LEAVES) - {avoided}:
    chain = chains.chain(digest, places, {avoided})
    assert chain == chains.chain(digest, without)


def test_each_leaf_is_asked_for_once():
  places = {
    "a": [place("a", "b", "1"), place("a", "c", "2")],
    "b": [place("b", "c", "1"), place("b", "a", "2")],
    "c": [place("c", None, "1")],
  }
  asked = []

  def find(digests):
    asked.extend(digests)
    return {digest: places[digest] for digest in digests}

  assert chains.gather(find, ["a"]) == places
  assert sorted(asked) == ["a", "b", "c"]
  assert chains.gather(find, ["a"], known="bc") == {"a": places["a"]}


def test_the_base_at_fault_is_named():
  lost = {"a": [place("a", "b", "1")], "b": [place("b", "lost", "1")]}
  assert "its base lost is stored in no" in chains.explain("a", lost)
  loop = {"a": [place("a", "b", "1")], "b": [place("b", "a", "1")]}
  assert "differences to each other" in chains.explain("a", loop)
  assert "stored in no payload" in chains.explain("c", loop)


def near(x, seed):
  noise = np.random.default_rng(seed).standard_normal(x.shape)
  return (x * (1 + 1e-3 * noise)).astype(x.dtype)


@pytest.fixture
def repo(tmp_path):
  """Two roots that are near each other; a repack makes one depend on it."""
  repo = Repo.init(tmp_path / "repo")
  x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
  repo.commit({"x": x}, message="one")
  other = {"x": near(x, 1)}
  repo.commit(other, message="two", branch="other", parents=[])
  return repo


def patched(repo):
  found = np.array(repo.checkout("other")["x"])
  found[0, :5] += 1
  return {"x": found}


def places_of(repo, ref="other"):
  repo.index.refresh()
  digest = repo.tree(ref)["x"].digest
  return repo.index.find([digest])[digest]


def test_the_deepest_place_of_a_base_counts(repo):
  repo.repack()
  assert sorted(p.depth for p in places_of(repo)) == [0, 1]
  repo.commit(patched(repo), message="three", branch="other")
  [found] = places_of(repo)
  assert (found.encoding, found.depth) == ("sparse", 2)


@pytest.mark.parametrize("verb", ["push", "clone", "part"])
def test_a_copy_does_not_mind_what_depth_is_noted(tmp_path, verb):
  """Noted before a repack and a gc, which put the bases deeper."""
  repo = Repo.init(tmp_path / "repo")
  x = value(leaves=1)
  repo.commit(x, message="one")
  for step in range(2):
    x = {**x, "layer0": {**x["layer0"]}}
    x["layer0"]["kernel"] = x["layer0"]["kernel"].copy()
    x["layer0"]["kernel"][: 20 * (step + 1)] += np.float32(step + 1)
    repo.commit(x, message="more")
  name = "layer0/kernel"
  repo.index.refresh()
  digest = repo.tree()[name].digest
  [last] = repo.index.find([digest])[digest]
  assert last.depth == 2
  # The one in the middle is deeper than what lies on it believes.
  entries = {last.digest: {"base": last.base, "depth": 1}}
  rewrite(repo, last.pack, entries)
  if verb == "push":
    repo.push(tmp_path / "there")
    there = Repo(tmp_path / "there")
  else:
    only = "layer0/.*" if verb == "part" else None
    there = Repo.clone(repo.path, tmp_path / "there", only=only)
  assert equal(there.checkout(), x)
  assert there.fsck().ok


def rewrite(repo, pack, changes):
  """Writes other facts of leaves into the index of a payload or blob."""
  if pack.startswith("blobs/"):
    data = repo.files.read(pack)
    facts, start = blobs.read_header(data, pack[6:])
    for digest, fields in changes.items():
      facts["index"][digest].update(fields)
    header = canonical_json(facts)
    head = [blobs.MAGIC, len(header).to_bytes(8, "little"), header]
    new = b"".join([*head, data[start:]])
    repo.files.delete(pack)
    repo.files.write(f"blobs/{blobs.name_of(new)}", new)
  else:
    key = f"{pack}/{index.INDEX}"
    entries = json.loads(repo.files.read(key))["entries"]
    for digest, fields in changes.items():
      entries[digest].update(fields)
    index.write(repo.files, pack, entries)
  repo.index.forget()


def test_indices_that_run_in_circles_are_an_error_that_names_the_leaf(repo):
  value = patched(repo)
  repo.commit(value, message="three", branch="other")
  [found] = places_of(repo)
  [base] = places_of(repo, "other~1")
  fields = {"base": found.digest, "encoding": "sparse", "depth": 1}
  rewrite(repo, base.pack, {base.digest: fields})
  opened = Repo(repo.path)
  with pytest.raises(errors.IntegrityError, match="  x: float32"):
    opened.checkout("other")
  with pytest.raises(errors.IntegrityError, match="  x: float32"):
    opened.open("other")["x"][:1]
  report = opened.fsck(quick=True)
  assert "differences to each other" in str(report)
  # A commit of the same value mends it.
  whole = Repo(repo.path)
  whole.commit(value, message="again", branch="again", parents=[])
  assert equal(Repo(repo.path).checkout("other"), value)
