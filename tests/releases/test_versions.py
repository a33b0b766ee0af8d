"""Semantic versions: text, order, and the computed level."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from patchjax.releases import Interface, bump, classify, parse
from patchjax.releases.versions import tag_of
from patchjax.trees.digest import Entry
from patchjax.trees.errors import FormatError
from patchjax.vetting import Policy, Suite, Test, gate

NUMBERS = st.integers(0, 10**6)
WORD = st.one_of(
  NUMBERS.map(str),
  st.from_regex(r"[a-z-][0-9a-z-]{0,4}", fullmatch=True),
)
PRERELEASE = st.lists(WORD, max_size=3).map(".".join)


@st.composite
def version_texts(draw):
  text = ".".join(str(draw(NUMBERS)) for _ in range(3))
  pre, build = draw(PRERELEASE), draw(PRERELEASE)
  return text + (f"-{pre}" if pre else "") + (f"+{build}" if build else "")


def semver_key(text):
  """Section 11 of semver.org 2.0.0 as a sortable key."""
  core, _, pre = text.partition("+")[0].partition("-")
  words = [
    (0, int(w), "") if w.isdigit() else (1, 0, w) for w in pre.split(".") if w
  ]
  return [int(x) for x in core.split(".")], not pre, words


@hypothesis.given(version_texts())
def test_text_round_trip(text):
  assert str(parse(text)) == text
  assert parse(tag_of(text)) == parse(text)


@hypothesis.given(version_texts(), version_texts())
def test_order_is_that_of_the_standard(a, b):
  assert (parse(a) < parse(b)) == (semver_key(a) < semver_key(b))
  assert (parse(a) == parse(b)) == (semver_key(a) == semver_key(b))


def test_order_of_the_standards_own_example():
  texts = [
    "alpha",
    "alpha.1",
    "alpha.beta",
    "beta",
    "beta.2",
    "beta.11",
    "rc.1",
  ]
  found = [parse(f"1.0.0-{text}") for text in texts] + [parse("1.0.0")]
  assert all(a < b for a, b in itertools.pairwise(found))


@hypothesis.given(
  st.tuples(NUMBERS, NUMBERS, NUMBERS),
  st.sampled_from(["patch", "minor", "major"]),
)
def test_bump_goes_up_by_one_and_resets(numbers, level):
  text = ".".join(map(str, numbers))
  found = bump(text, level)
  assert found > parse(text)
  i = ["major", "minor", "patch"].index(level)
  assert found.to_tuple()[:3] == (*numbers[:i], numbers[i] + 1, *[0] * (2 - i))


@pytest.mark.parametrize(
  "text", ["", "1", "1.0", "01.0.0", "1.0.0.0", "vv1.0.0"]
)
def test_parse_refuses(text):
  with pytest.raises(FormatError, match="MAJOR.MINOR.PATCH"):
    parse(text)


def test_bump_refuses():
  with pytest.raises(ValueError, match="patch, minor or major, got 'huge'"):
    bump("1.0.0", "huge")


def entries(**leaves):
  """`name=(digest, shape)` or `name=(digest, shape, dtype)`."""
  return {
    name: Entry(digest=d, dtype=rest[0] if rest else "float32", shape=shape)
    for name, (d, shape, *rest) in leaves.items()
  }


def verdict(lost, n=1000):
  suite = Suite("s", "1", [Test("t", lambda p: p)])
  old, new = np.ones(n), np.ones(n)
  new[:lost] = 0
  return gate(
    suite.outcomes({"t": old}), suite.outcomes({"t": new}), suite, Policy()
  )


ACCEPTED, REFUSED, UNDECIDED = verdict(0), verdict(300), verdict(5)
BASE = entries(w=("a", (10, 10)), b=("b", (10,)))


def test_the_three_verdicts_of_these_tests():
  outcomes = [v.outcome for v in (ACCEPTED, REFUSED, UNDECIDED)]
  assert outcomes == ["accepted", "refused", "undecided"]


def test_patch_by_exact_counts():
  new = entries(w=("x", (10, 10)), b=("b", (10,)))
  found = classify(BASE, new, ACCEPTED, changed={"w": 55})
  assert found.level == "patch" and not found.refused
  assert found.retained == 1.0 and found.changed == 55 / 110
  found = classify(BASE, new, ACCEPTED, changed={"w": 56})
  assert found.level == "minor" and found.changed == 56 / 110
  # Without a count a leaf of another digest counts as changed altogether.
  found = classify(BASE, new, ACCEPTED)
  assert found.level == "minor" and found.changed == 100 / 110
  found = classify(BASE, new, ACCEPTED, Policy(changed=0.95))
  assert found.level == "patch"


def test_nothing_changed_is_a_patch():
  found = classify(BASE, BASE, ACCEPTED)
  assert (found.level, found.changed, found.retained) == ("patch", 0.0, 1.0)


@pytest.mark.parametrize("evidence", [REFUSED, UNDECIDED, None])
def test_no_level_without_accepting_evidence(evidence):
  larger = BASE | entries(extra=("c", (3,)))
  other = entries(v=("d", (10, 10)))
  for new, structural in ((BASE, "patch"), (larger, "minor"), (other, "major")):
    found = classify(BASE, new, evidence)
    assert found.refused and found.structural == structural
    overridden = classify(BASE, new, evidence, override="needed by May")
    assert overridden.level == "major"
    assert overridden.reasons[-1] == "overridden by a maintainer: needed by May"


def test_refusal_says_why():
  reasons = " ".join(classify(BASE, BASE, REFUSED).reasons)
  assert "s@1: refused" in reasons and "300 lost, 0 gained" in reasons
  assert "not tested" in " ".join(classify(BASE, BASE, None).reasons)


def test_an_override_is_not_used_where_the_gate_accepts():
  assert classify(BASE, BASE, ACCEPTED, override="why not").level == "patch"
  with pytest.raises(ValueError, match="blank"):
    classify(BASE, BASE, REFUSED, override="  ")


@pytest.mark.parametrize(
  "new, reason",
  [
    (BASE | entries(extra=("c", (1000,))), "1 leaves added: 'extra'"),
    (entries(w=("a", (10, 10))), "1 leaves gone or of another shape: 'b'"),
    (
      entries(w=("a", (10, 10)), b=("b", (11,))),
      "1 leaves gone or of another shape: 'b'",
    ),
    (
      entries(w=("x", (10, 10), "bfloat16"), b=("b", (10,))),
      "1 leaves of another dtype: 'w (float32 -> bfloat16)'",
    ),
  ],
)
def test_minor_by_structure(new, reason):
  found = classify(BASE, new, ACCEPTED)
  assert found.level == "minor"
  assert reason in found.reasons


def test_major_where_less_than_half_is_retained():
  base = entries(a=("a", (50,)), b=("b", (50,)))
  half = classify(base, entries(a=("a", (50,))), ACCEPTED)
  assert (half.level, half.retained) == ("minor", 0.5)
  base = entries(a=("a", (49,)), b=("b", (51,)))
  found = classify(base, entries(a=("a", (49,))), ACCEPTED)
  assert (found.level, found.retained) == ("major", 0.49)
  # By entries, not by leaves.
  base = entries(a=("a", (1,)), b=("b", (1,)), c=("c", (98,)))
  new = entries(a=("a", (1,)), b=("b", (1,)))
  assert classify(base, new, ACCEPTED).level == "major"


def test_a_declared_map_carries_renamed_and_grown_leaves():
  base = entries(w=("a", (4, 4)))
  moved = entries(v=("a", (4, 4)))
  assert classify(base, moved, ACCEPTED).level == "major"
  found = classify(base, moved, ACCEPTED, carried={"w": "v"})
  assert (found.level, found.retained, found.changed) == ("minor", 1.0, 0.0)
  grown = entries(w=("b", (8, 4)))
  assert classify(base, grown, ACCEPTED).level == "major"
  found = classify(base, grown, ACCEPTED, carried={"w": "w"})
  assert (found.level, found.retained, found.changed) == ("minor", 1.0, 1.0)


def test_swapped_leaves_by_a_map():
  base = entries(a=("1", (3,)), b=("2", (3,)))
  swapped = entries(a=("2", (3,)), b=("1", (3,)))
  found = classify(base, swapped, ACCEPTED, carried={"a": "b", "b": "a"})
  assert (found.changed, found.level) == (0.0, "minor")


def test_interface_decides_major_and_minor():
  old = Interface(
    inputs={"rgb": "f32[h,w,3]", "depth": "f32[h,w]"},
    outputs={"logits": "f32[v]"},
    tokenizer="t1",
  )

  def level(**changes):
    fields = {
      "inputs": dict(old.inputs),
      "outputs": dict(old.outputs),
      "tokenizer": "t1",
    }
    new = Interface(**(fields | changes))
    return classify(BASE, BASE, ACCEPTED, old_interface=old, new_interface=new)

  assert level().level == "patch"
  found = level(inputs={"rgb": "f32[h,w,3]"})
  assert found.level == "major"
  assert found.reasons[0] == "input 'depth' is removed"
  assert level(outputs={"logits": "f32[u]"}).level == "major"
  assert level(outputs={}).level == "major"
  assert level(tokenizer="t2").level == "major"
  wider = {**old.inputs, "text": "i32[t]"}
  assert level(inputs=wider).level == "minor"


def test_trees_without_entries():
  empty = entries(z=("a", (0, 3)))
  found = classify(empty, empty, ACCEPTED)
  assert (found.level, found.retained, found.changed) == ("patch", 1.0, 0.0)


@pytest.mark.parametrize(
  "arguments, words",
  [
    ({"carried": {"x": "w"}}, "do not exist: 'x -> w'"),
    ({"carried": {"w": "x"}}, "do not exist: 'w -> x'"),
    ({"carried": {"w": "w", "b": "w"}}, "two leaves onto one"),
    ({"changed": {"w": 101}}, "is 101, but the leaf has 100"),
  ],
)
def test_classify_refuses(arguments, words):
  new = entries(w=("x", (10, 10)), b=("b", (10,)))
  with pytest.raises(ValueError, match=words):
    classify(BASE, new, ACCEPTED, **arguments)
