"""Releases on a real repository: computed, refused, overridden, stored."""

import dataclasses
import json

import numpy as np
import pytest

from patchjax import releases
from patchjax.history import Repo
from patchjax.releases import Interface, Release, release
from patchjax.trees.errors import FormatError, ReleaseRefusedError, VetError
from patchjax.vetting import Policy, Suite, Test, gate, record, uses
from patchjax.vetting.ledger import verdicts

SUITE = Suite(
  "signs", "1.0.0", [Test("right", lambda p: np.asarray(p["w"])[:1000] > 0)]
)


def params(wrong=0, **more):
  w = np.ones(2000, np.float32)
  w[:wrong] = -1.0
  return {"w": w, **more}


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    repo.commit(params(), message="pretrained")
    yield repo


def commit(repo, value, branch="main"):
  repo.commit(value, message="change", branch=branch)


def touched(count):
  """Other values that score the same."""
  value = params()
  value["w"][1000 : 1000 + count] = 2.0
  return value


def test_first_release_is_one(repo):
  made = release(repo, "main", suite=SUITE)
  assert (made.version, made.level, made.previous) == ("1.0.0", "first", "")
  assert (made.suite, made.suite_digest) == (SUITE.label, SUITE.digest)
  assert repo.resolve("v1.0.0") == made.commit == repo.resolve("main")
  (note,) = repo.annotations("v1.0.0", "release")
  assert Release.from_json(note["payload"]) == made
  assert uses(repo, SUITE) == 0  # nothing was compared


def test_patch_with_its_evidence_stored(repo):
  release(repo, "main", suite=SUITE)
  commit(repo, touched(500))
  made = release(repo, "main", suite=SUITE)
  assert (made.version, made.level, made.previous) == (
    "1.0.1",
    "patch",
    "1.0.0",
  )
  assert (made.retained, made.changed) == (1.0, 0.25)
  row = made.verdict["rows"][0]
  assert (row["n"], row["lost"], row["gained"]) == (1000, 0, 0)
  assert row["flip_bound"] < 0.02 and row["low"] > -0.01
  assert made.verdict["digest"] == SUITE.digest
  assert repo.resolve("v1.0.1") == repo.resolve("main")
  assert uses(repo, SUITE) == 1
  assert releases.release.__module__  # the function, not the module
  found = releases.releases(repo, "main")
  assert [r.version for r in found] == ["1.0.1", "1.0.0"] and found[0] == made


def test_more_than_half_changed_is_a_minor(repo):
  release(repo, "main")
  value = touched(1000)
  value["w"][:1] = 3.0
  commit(repo, value)
  assert release(repo, "main", suite=SUITE).version == "1.1.0"
  commit(repo, params())
  lenient = Policy(changed=1.0)
  made = release(repo, "main", suite=SUITE, policy=lenient)
  assert made.version == "1.1.1"


def test_added_leaf_is_a_minor_and_a_replaced_one_a_major(repo):
  release(repo, "main")
  commit(repo, params(extra=np.zeros(5, np.float32)))
  made = release(repo, "main", suite=SUITE)
  assert (made.version, made.reasons[0]) == ("1.1.0", "1 leaves added: 'extra'")
  commit(repo, {"w": np.ones((1000,), np.float32)})
  made = release(repo, "main", suite=SUITE)
  assert (made.version, made.level) == ("2.0.0", "major")


def test_a_declared_map_keeps_it_a_minor(repo):
  release(repo, "main")
  grown = {"w": np.concatenate([params()["w"], np.zeros(50, np.float32)])}
  commit(repo, grown)
  made = release(repo, "main", suite=SUITE, carried={"w": "w"})
  assert made.version == "1.1.0"


def test_refused_leaves_no_tag_but_the_verdict(repo):
  release(repo, "main")
  commit(repo, params(wrong=200))
  with pytest.raises(ReleaseRefusedError) as raised:
    release(repo, "main", suite=SUITE)
  text = str(raised.value)
  assert "after 1.0.0" in text and "200 lost, 0 gained" in text
  assert "override in writing" in text
  assert list(repo.tags()) == ["v1.0.0"]
  assert repo.annotations("main", "release") == []
  assert verdicts(repo, "main")[0].refused and uses(repo, SUITE) == 1


def test_undecided_is_refused_with_advice(repo):
  release(repo, "main")
  commit(repo, params(wrong=8))
  with pytest.raises(ReleaseRefusedError, match="undecided") as raised:
    release(repo, "main", suite=SUITE)
  assert "more) " in str(raised.value)


def test_untested_is_refused(repo):
  release(repo, "main")
  commit(repo, touched(5))
  with pytest.raises(ReleaseRefusedError, match="not tested: run a gate"):
    release(repo, "main")


def test_override_in_writing_is_a_major(repo):
  release(repo, "main")
  commit(repo, params(wrong=200))
  made = release(repo, "main", suite=SUITE, override="legal asked for it")
  assert (made.version, made.level) == ("2.0.0", "major")
  assert made.override == "legal asked for it"
  assert made.verdict["outcome"] == "refused"
  assert "overridden by a maintainer: legal asked for it" in made.reasons
  with pytest.raises(ValueError, match="blank"):
    commit(repo, params(wrong=300))
    release(repo, "main", suite=SUITE, override=" ")


def test_identical_values_are_an_error(repo):
  release(repo, "main")
  with pytest.raises(ReleaseRefusedError, match="very values of release 1.0.0"):
    release(repo, "main", suite=SUITE)
  # The same values in another commit, too.
  repo.commit(params(), message="nothing new")
  with pytest.raises(ReleaseRefusedError, match="use v1.0.0"):
    release(repo, "main", suite=SUITE)


def test_previous_release_must_be_an_ancestor(repo):
  release(repo, "main")
  repo.branch("side")
  commit(repo, touched(10))
  release(repo, "main", suite=SUITE)
  commit(repo, touched(20), branch="side")
  with pytest.raises(ReleaseRefusedError, match="1.0.1 is taken.*merge that"):
    release(repo, "side", suite=SUITE)
  # A release of an older version is compared with its own past.
  assert releases.releases(repo, "side")[0].version == "1.0.0"


def test_a_stray_tag_is_not_a_release(repo):
  repo.tag("v1.0.0", "main")
  assert releases.releases(repo, "main") == []
  with pytest.raises(ReleaseRefusedError, match="names this very commit"):
    release(repo, "main")


def test_an_interrupted_release_can_be_made_again(repo, monkeypatch):
  def killed(self, *args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as context:
    context.setattr(Repo, "tag", killed)
    with pytest.raises(KeyboardInterrupt):
      release(repo, "main", suite=SUITE)
  assert len(repo.annotations("main", "release")) == 1
  assert releases.releases(repo, "main") == []
  assert release(repo, "main", suite=SUITE).version == "1.0.0"
  assert len(releases.releases(repo, "main")) == 1


def test_a_stored_verdict_is_the_evidence(repo):
  release(repo, "main")
  commit(repo, touched(10))
  verdict = gate(repo.checkout("v1.0.0"), repo.checkout("main"), SUITE, used=0)
  record(repo, "main", verdict)
  made = release(repo, "main")  # no suite at hand
  assert made.version == "1.0.1" and made.verdict == verdict.to_json()
  assert uses(repo, SUITE) == 1


def test_a_stored_verdict_must_answer_what_is_asked(repo):
  release(repo, "main")
  commit(repo, touched(10))
  lax = Policy(margin=0.5, flips=None)
  old, new = repo.checkout("v1.0.0"), repo.checkout("main")
  record(repo, "main", gate(old, new, SUITE, lax))
  # A stricter policy, a claim or another suite asks for a new run.
  strict = Policy(margin=0.0001)
  with pytest.raises(ReleaseRefusedError, match="undecided"):
    release(repo, "main", suite=SUITE, policy=strict)
  with pytest.raises(ReleaseRefusedError, match="claimed gain"):
    release(repo, "main", suite=SUITE, claims=["right"])
  assert [v.policy for v in verdicts(repo, "main")] == [lax, strict, Policy()]


def test_a_verdict_on_other_values_is_refused(repo):
  first = release(repo, "main")
  commit(repo, touched(10))
  old, new = repo.checkout("v1.0.0"), repo.checkout("main")
  for verdict, words in (
    (gate(old, touched(11), SUITE), "not about commit"),
    (gate(touched(12), new, SUITE), "not about release 1.0.0"),
    (
      dataclasses.replace(gate(old, new, SUITE), new=""),
      "of tree unknown, expected",
    ),
  ):
    with pytest.raises(VetError, match=words):
      release(repo, "main", verdict=verdict)
  verdict = gate(old, new, SUITE)
  with pytest.raises(VetError, match="another policy"):
    release(repo, "main", verdict=verdict, policy=Policy(margin=0.1))
  assert verdict.old == first.tree
  assert release(repo, "main", verdict=verdict).version == "1.0.1"


def test_interface_is_kept_and_compared(repo):
  wide = Interface(inputs={"rgb": "f32[n]", "depth": "f32[n]"}, tokenizer="t")
  release(repo, "main", interface=wide)
  commit(repo, touched(10))
  made = release(repo, "main", suite=SUITE)  # not given: as before
  assert made.version == "1.0.1"
  assert made.interface == dataclasses.asdict(wide)
  commit(repo, touched(20))
  narrow = Interface(inputs={"rgb": "f32[n]"}, tokenizer="t")
  made = release(repo, "main", suite=SUITE, interface=narrow)
  assert made.version == "2.0.0"
  assert made.reasons[0] == "input 'depth' is removed"


def test_json_round_trip_and_text(repo):
  release(repo, "main")
  commit(repo, touched(10))
  made = release(repo, "main", suite=SUITE)
  assert Release.from_json(json.dumps(made.to_json())) == made
  assert str(made).startswith("released 1.0.1 (patch after 1.0.0)")
  assert "0.50% of the entries changed" in str(made)
  for value in (
    "{",
    {"schema": "patchjax/release/9"},
    {**made.to_json(), "x": 1},
  ):
    with pytest.raises(FormatError, match="not a release"):
      Release.from_json(value)
