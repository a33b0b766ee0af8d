"""Train state: everything that the next step depends on, in one commit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import patchjax as pj
from patchjax.history import Record, Repo
from patchjax.history.arrays import state
from patchjax.trees import errors
from tests.history import trainer


@pytest.fixture
def repo():
  with Repo.temporary() as repo:
    yield repo


def same(a, b):
  return trainer.digest(a) == trainer.digest(b)


def test_a_run_goes_on_in_another_process_as_if_nothing_happened(
  tmp_path, tmp_path_factory
):
  # Sharded parameters, masked adam with injected hyper-parameters, typed and
  # raw keys, a weak scale, a step and a shuffled iterator.
  def process(*arguments):
    return trainer.process(tmp_path_factory.getbasetemp(), *arguments)[-1]

  process("run", tmp_path / "a", 5)
  interrupted = process("resume", tmp_path / "a", 9)
  assert interrupted == process("run", tmp_path / "b", 9)
  a, b = Repo(tmp_path / "a"), Repo(tmp_path / "b")
  assert a.show().tree == b.show().tree
  assert a.show("main~1").tree != a.show().tree


def test_the_state_of_optimizers_has_readable_names(repo):
  params = {"dense": {"kernel": jnp.ones((2, 3))}}
  optimizer = optax.chain(
    optax.clip(1.0), optax.masked(optax.adam(1e-3), {"dense": True})
  )
  repo.commit({"opt": optimizer.init(params)}, message="m")
  assert list(repo.tree()) == [
    "opt/1/inner_state/0/count",
    "opt/1/inner_state/0/mu/dense/kernel",
    "opt/1/inner_state/0/nu/dense/kernel",
  ]


def test_only_reads_the_parameters_alone(repo):
  # Random bits do not compress: what is read is what is asked for.
  rng = np.random.default_rng(0)
  x = rng.standard_normal((3, 1 << 18), np.float32)
  whole = {
    "params": {"w": jnp.asarray(x[0])},
    "opt": optax.ScaleByAdamState(
      jnp.int32(1), {"w": jnp.asarray(x[1])}, {"w": jnp.asarray(x[2])}
    ),
    "data": Record({"at": 3}),
  }
  repo.commit(whole, message="m")
  repo.checkout(only="data")  # imports, caches
  before = bytes_read()
  found = repo.checkout(only="params/.*")
  assert x[0].nbytes <= bytes_read() - before < 1.5 * x[0].nbytes
  assert same(found, {"params": whole["params"]})
  kept = repo.checkout(like=whole, only="params/.*")
  assert kept["opt"].mu["w"] is whole["opt"].mu["w"]
  assert kept["data"] is whole["data"]
  assert same(kept, whole)


def bytes_read():
  """Bytes that this process has read from files, by any library."""
  facts = pathlib.Path("/proc/self/io").read_text().splitlines()
  return int(facts[0].removeprefix("rchar: "))


@pytest.mark.parametrize(
  "number",
  [True, False, 0, -(2**63), 2**63 - 1, -0.0, 0.1, float("inf"), 5e-324]
  + [1 - 2.5j, complex(-0.0, float("inf"))],
)
def test_python_numbers_come_back_as_they_were(repo, number):
  commit = repo.commit({"x": number}, message="m")
  back = repo.checkout(commit, like={"x": type(number)()})["x"]
  assert type(back) is type(number)
  assert repr(back) == repr(number)
  assert repo.show().tree == pj.trees.tree_id({"x": number})
  plain = repo.checkout(commit)["x"]
  assert pj.trees.tree_id({"x": plain}) == repo.show().tree


def test_nan_keeps_its_payload(repo):
  nan = np.uint64(0x7FF8000000001234).view(np.float64)
  repo.commit({"x": float(nan)}, message="m")
  back = repo.checkout(like={"x": 0.0})["x"]
  assert np.float64(back).view(np.uint64) == 0x7FF8000000001234


def test_a_step_counted_on_the_device_comes_back_as_the_int_it_started_as(repo):
  repo.commit({"step": jnp.int32(7), "lr": jnp.bfloat16(0.5)}, message="m")
  back = repo.checkout(like={"step": 0, "lr": 0.0})
  assert back == {"step": 7, "lr": 0.5} and type(back["step"]) is int
  for wrong in ({"step": 0.0, "lr": 0.0}, {"step": 0, "lr": True}):
    with pytest.raises(errors.MismatchError, match="another dtype"):
      repo.checkout(like=wrong)


def test_a_number_that_is_not_stored_is_missed(repo):
  repo.commit({"w": np.ones(2)}, message="m")
  with pytest.raises(errors.MismatchError, match="step: int64"):
    repo.checkout(like={"w": np.ones(2), "step": 0})
  with pytest.raises(errors.MismatchError, match="data: uint8"):
    repo.checkout(like={"w": np.ones(2), "data": Record(None)})


def test_numbers_beyond_64_bits_are_refused_with_the_remedy(repo):
  with pytest.raises(errors.DtypeError, match=r"seed.*Record"):
    repo.commit({"w": np.ones(2), "seed": 2**63}, message="m")
  repo.commit({"seed": Record(2**128)}, message="m")
  assert repo.checkout(like={"seed": Record(0)})["seed"].value == 2**128


def test_weak_types_stay_weak(repo):
  repo.commit({"x": jnp.full(3, 0.1), "y": jnp.ones(3)}, message="m")
  like = {"x": jnp.full(3, 0.0), "y": jnp.zeros(3)}
  back = repo.checkout(like=like)
  assert back["x"].weak_type and not back["y"].weak_type
  assert same(back, {"x": jnp.full(3, 0.1), "y": jnp.ones(3)})


@pytest.mark.parametrize(
  "value",
  [b"", b"\x00{}", "", "ä\n", None, True, 2**200, -0.5, [], {"a": [1, {}]}],
)
def test_records_come_back(repo, value):
  repo.commit({"it": Record(value)}, message="m")
  back = repo.checkout(like={"it": Record("anything")})["it"].value
  assert back == value and type(back) is type(value)
  assert state.decode(repo.checkout()["it"]) == value


def test_the_state_of_numpy_generators_is_a_record(repo):
  rng = np.random.default_rng(5)
  rng.random(3)
  repo.commit({"rng": Record(rng.bit_generator.state)}, message="m")
  other = np.random.default_rng()
  found = repo.checkout(like={"rng": Record(None)})["rng"]
  other.bit_generator.state = found.value
  assert other.random() == rng.random()


@pytest.mark.parametrize(
  "value, why",
  [
    ((1, 2), "value is a tuple"),
    ({"a": [1, (2,)]}, r"value\['a'\]\[1\] is a tuple"),
    ({1: 2}, "the key 1 .int."),
    (np.ones(2), "value is a ndarray"),
    ({"a": np.int64(1)}, r"value\['a'\] is a int64"),
    (float("nan"), "value is nan"),
    (object(), "value is a object"),
    ("\ud800", "no Unicode"),
  ],
)
def test_what_would_come_back_changed_is_refused(repo, value, why):
  with pytest.raises(errors.DtypeError, match=rf"it: .*{why}"):
    repo.commit({"it": Record(value)}, message="m")


def test_what_is_no_record_is_not_decoded(repo):
  for array in (np.uint8([1, 2]), np.uint8([]), np.ones(3), np.uint8([[0]])):
    with pytest.raises(errors.FormatError, match="record"):
      state.decode(array)
  repo.commit({"it": np.ones(3)}, message="m")
  with pytest.raises(errors.MismatchError, match=r"it: float64\[3\]"):
    repo.checkout(like={"it": Record(None)})


def test_texts_that_are_no_records_are_left_out_and_said_to_be(repo):
  with pytest.warns(UserWarning, match="not stored: name = 'x'"):
    repo.commit({"w": np.ones(2), "name": "x"}, message="m")
  assert list(repo.tree()) == ["w"]


def test_a_patch_passes_numbers_by(repo):
  model = {"w": np.ones(3, np.float32), "rate": 0.1, "n": 3}
  tuned = {**model, "w": np.float32([1, 2, 3])}
  repo.commit(model, message="model")
  repo.commit(pj.diff(model, tuned), message="patched")
  assert same(repo.checkout(like=model), tuned)
  # The model without its numbers is the same base.
  arrays = {"w": tuned["w"]}
  patch = pj.diff(arrays, {"w": np.zeros(3, np.float32)}, exact=True)
  repo.commit(patch.replace(base=pj.trees.tree_id(arrays)), message="again")
  assert repo.checkout(like=model)["w"].tolist() == [0, 0, 0]
  with pytest.raises(errors.BaseMismatchError):
    repo.commit(patch.replace(base=pj.trees.tree_id(arrays)), message="no")


def test_equinox_modules_keep_their_numbers(repo):
  import equinox as eqx

  model = eqx.nn.Sequential(
    [eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.nn.Dropout(0.25)]
  )
  repo.commit(model, message="m")
  like = eqx.nn.Sequential(
    [eqx.nn.Linear(2, 3, key=jax.random.key(1)), eqx.nn.Dropout(0.5)]
  )
  back = repo.checkout(like=like)
  assert back.layers[1].p == 0.25
  assert eqx.tree_equal(back, model)
