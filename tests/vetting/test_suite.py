"""Suites and outcomes: what is refused, what a digest covers, files."""

import json
import struct
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from patchjax.trees.digest import tree_id
from patchjax.trees.errors import FormatError, VetError
from patchjax.vetting import Outcomes, Suite, Test, gate


def identity(params):
  return params


def suite_of(**slices):
  return Suite("s", "1.0.0", [Test("t", identity, slices=slices)])


def test_run_names_the_values_it_tested():
  params = {"w": jnp.array([1.0, -1.0, 2.0], jnp.float32)}
  suite = Suite("s", "1", [Test("t", lambda p: p["w"] > 0)])
  outcomes = suite.run(params)
  assert outcomes.subject == tree_id(params)
  assert outcomes.values["t"].dtype == np.float64
  assert outcomes.values["t"].tolist() == [1.0, 0.0, 1.0]
  assert suite.run(params, subject="known").subject == "known"


def test_run_with_progress(capsys):
  suite = suite_of()
  suite.run(np.ones(3, np.float32), progress=True)
  assert "s@1.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
  "value", [np.ones(4, ml_dtypes.bfloat16), [True, False], np.int8([0, 1])]
)
def test_outcomes_of_every_number_dtype(value):
  found = suite_of().outcomes({"t": value}).values["t"]
  assert found.dtype == np.float64
  assert found.tolist() == [float(x) for x in value]


@pytest.mark.parametrize(
  "value, words",
  [
    ([1.0, np.nan, np.nan], "'t': 2 of 3 outcomes.*first is nan at example 1"),
    ([1.0, np.inf], "'t': 1 of 2 outcomes are not finite"),
    (0.75, r"'t': expected one outcome an example.*found shape \(\)"),
    (np.ones((2, 3)), r"found shape \(2, 3\)"),
    ([], r"found shape \(0,\)"),
    (["right", "wrong"], "'t': expected numbers or booleans, found <U5"),
    (np.ones(2, np.complex64), "found complex64"),
  ],
)
def test_outcomes_refuse(value, words):
  with pytest.raises(VetError, match=words):
    suite_of().run(value, subject="")


@pytest.mark.parametrize(
  "members, words",
  [
    ([], "slice 't/a' has no examples"),
    (np.zeros(4, bool), "slice 't/a' has no examples"),
    (np.ones((2, 2), bool), r"'t/a'.*found shape \(2, 2\)"),
    ([0.5], "'t/a': expected booleans or integers, found float64"),
    ([0, 0], "'t/a': indices must be different"),
    ([-1], "'t/a': indices must be different and not negative"),
  ],
)
def test_slices_refuse(members, words):
  with pytest.raises(VetError, match=words):
    suite_of(a=members)


def test_slices_must_fit_the_examples():
  with pytest.raises(VetError, match="'t/a': the mask has 3 entries.*4 exampl"):
    suite_of(a=[True, True, False]).run(np.ones(4), subject="")
  with pytest.raises(VetError, match="'t/a': index 4 is out of the 4"):
    suite_of(a=[4]).run(np.ones(4), subject="")
  suite = Suite("s", "1", [Test("t", identity, clusters=[0, 1])])
  with pytest.raises(VetError, match="'t': 2 clusters for 4 examples"):
    suite.run(np.ones(4), subject="")


def test_declarations_refuse():
  with pytest.raises(VetError, match="without '/', got 'a/b'"):
    Test("a/b", identity)
  with pytest.raises(VetError, match="slice of test 't'.*got ''"):
    suite_of(**{"": [0]})
  with pytest.raises(VetError, match="evaluate must be a function.*float"):
    Test("t", 0.5)
  with pytest.raises(VetError, match=r"clusters.*found shape \(1, 2\)"):
    Test("t", identity, clusters=[[0, 1]])
  with pytest.raises(VetError, match="has no tests"):
    Suite("s", "1", [])
  with pytest.raises(VetError, match="name and a version"):
    Suite("s", "", [Test("t", identity)])
  with pytest.raises(VetError, match="two tests are called 't'"):
    Suite("s", "1", [Test("t", identity), Test("t", identity)])
  with pytest.raises(VetError, match="no test 'x'; it has 't'"):
    suite_of()["x"]


def test_missing_and_unknown_tests():
  with pytest.raises(VetError, match="missing for 't' and unknown are 'x'"):
    suite_of().outcomes({"x": [1.0]})


def test_digest_covers_the_declaration_and_not_the_code():
  base = suite_of(a=[0, 1])
  assert base.digest == suite_of(a=np.int32([1, 0])).digest
  assert (
    base.digest
    == Suite(
      "s", "1.0.0", [Test("t", lambda p: 1 * p, slices={"a": [0, 1]})]
    ).digest
  )
  others = [
    suite_of(a=[0, 2]),
    suite_of(b=[0, 1]),
    suite_of(a=[True, True]),
    Suite("s", "1.0.1", base.tests),
    Suite("r", "1.0.0", base.tests),
    Suite("s", "1.0.0", [Test("u", identity, slices={"a": [0, 1]})]),
    Suite(
      "s",
      "1.0.0",
      [Test("t", identity, slices={"a": [0, 1]}, protected=False)],
    ),
    Suite("s", "1.0.0", [Test("t", identity, slices={"a": [0, 1]}, data="x")]),
    Suite(
      "s", "1.0.0", [Test("t", identity, slices={"a": [0, 1]}, clusters=[0, 0])]
    ),
  ]
  digests = {suite.digest for suite in (base, *others)}
  assert len(digests) == 1 + len(others)


def test_digest_takes_clusters_as_groups():
  named = Suite("s", "1", [Test("t", identity, clusters=["a", "b", "a"])])
  counted = Suite("s", "1", [Test("t", identity, clusters=[0, 1, 0])])
  assert named.digest == counted.digest


@pytest.fixture
def outcomes():
  suite = Suite("s", "1", [Test("z", identity), Test("a", identity)])
  rng = np.random.default_rng(0)
  return suite, suite.outcomes(
    {"z": rng.random(50) < 0.7, "a": rng.normal(size=60)}, subject="ab" * 32
  )


def test_file_round_trip_is_exact(outcomes, tmp_path):
  suite, kept = outcomes
  path = tmp_path / "kept.safetensors"
  kept.save(path)
  found = Outcomes.load(path)
  assert (found.suite, found.digest, found.subject) == (
    kept.suite,
    kept.digest,
    kept.subject,
  )
  assert list(found.values) == ["z", "a"]
  for name in kept.values:
    np.testing.assert_array_equal(found.values[name], kept.values[name])
    assert found.values[name].dtype == np.float64
  assert gate(found, kept, suite) == gate(kept, found, suite)
  assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_file_damaged_anywhere_is_refused(outcomes, tmp_path):
  _, kept = outcomes
  path = tmp_path / "kept.safetensors"
  kept.save(path)
  good = path.read_bytes()
  for position in range(8, len(good), 37):
    data = bytearray(good)
    data[position] ^= 0x20
    path.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"kept\.safetensors"):
      Outcomes.load(path)
  for length in (0, 5, 100, len(good) - 1):
    path.write_bytes(good[:length])
    with pytest.raises(FormatError, match=r"kept\.safetensors"):
      Outcomes.load(path)


def test_file_of_another_kind_or_version_is_refused(outcomes, tmp_path):
  _, kept = outcomes
  path = tmp_path / "kept.safetensors"
  kept.save(path)
  data = path.read_bytes().replace(b"outcomes/1", b"outcomes/9")
  path.write_bytes(data)
  with pytest.raises(FormatError, match="outcomes/9.*newer patchjax"):
    Outcomes.load(path)
  header = json.dumps({}).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header)
  with pytest.raises(FormatError, match="found 'nothing'"):
    Outcomes.load(path)


def test_file_errors_of_the_system(outcomes, tmp_path):
  _, kept = outcomes
  with pytest.raises(FileNotFoundError):
    kept.save(tmp_path / "absent" / "kept.safetensors")
  with pytest.raises(FileNotFoundError):
    Outcomes.load(tmp_path / "absent.safetensors")


def test_an_interrupted_save_leaves_the_old_file(
  outcomes, tmp_path, monkeypatch
):
  _, kept = outcomes
  path = tmp_path / "kept.safetensors"
  path.write_bytes(b"old")

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="No space left"):
    kept.save(path)
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_vetting_needs_no_jax():
  code = (
    "import sys, numpy as np; from patchjax.vetting import *\n"
    "s = Suite('s', '1', [Test('t', lambda p: p)])\n"
    "x = s.outcomes({'t': np.ones(400)})\n"
    "assert gate(x, x, s).accepted; str(gate(x, x, s))\n"
    "print('jax' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "False"
