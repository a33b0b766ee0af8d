"""`merge --out`: files and versions into files, by options or by a recipe."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import patchjax as pj
from patchjax import interop
from patchjax.cli.app import patchjax

REGEX = "layers/.*"


def params(seed):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  layers = {str(i): {"w": draw(8, 4)} for i in range(3)}
  return {"embed": draw(16, 4), "layers": layers}


BASE, ONE, TWO = map(params, range(3))


@pytest.fixture
def models(tmp_path, monkeypatch):
  for name, value in {"base": BASE, "one": ONE, "two": TWO}.items():
    folder = tmp_path / name
    folder.mkdir()
    interop.write(folder / "model.safetensors", value)
  (tmp_path / "base" / "config.json").write_text('{"layers": 3}')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def run(*args, code=0):
  done = CliRunner().invoke(patchjax, list(map(str, args)))
  assert done.exit_code == code, (done.output, done.exception)
  return done.output


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    x.dtype == y.dtype and x.tobytes() == np.asarray(y).tobytes()
    for x, y in pairs
  )


def test_options(models):
  said = run(
    *("merge", "one", "two", "--base", "base", "--out", "merged"),
    *("--method", "ties", "--density", "0.5", "--set", "scale=0.5"),
    *("--override", REGEX + ':linear {"weights": [1, 3]}'),
    *("--out-dtype", "bfloat16", "--shard-size", "200"),
  )
  assert said.startswith("merged 2 models into merged: 320 B, ")
  methods = {
    REGEX: pj.merging.linear(weights=[1, 3]),
    None: pj.merging.ties(density=0.5, scale=0.5),
  }
  wanted = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16),
    pj.merge(BASE, [ONE, TWO], methods),
  )
  assert same(interop.read("merged"), wanted)
  names = sorted(path.name for path in (models / "merged").iterdir())
  assert names[0] == "config.json" and names[-1].endswith(".index.json")
  assert len(names) == 4
  said = run("merge", "one", "--out", "merged", "--method", "linear", code=2)
  assert "holds a model; choose another place, or --force" in said
  told = json.loads(
    run(
      *("merge", "one", "two", "--out", "merged", "--method", "linear"),
      *("--force", "--json"),
    )
  )
  assert told["files"] == ["merged/model.safetensors"]
  assert told["written"] == 640 and told["resumed"] == 0
  wanted = pj.merge(None, [ONE, TWO], pj.merging.linear())
  assert same(interop.read("merged"), wanted)


def test_a_recipe_with_gradients(models):
  recipe = {
    "base": "base",
    "models": ["one"],
    "method": "task_arithmetic",
    "options": {"scale": {REGEX: [0.0, 1.0], "default": 0.25}},
    "leaves": {".*2.*": {"method": "wise_ft", "options": {"alpha": 0.75}}},
  }
  (models / "recipe.json").write_text(json.dumps(recipe))
  run("merge", "--config", "recipe.json", "--out", "a.safetensors")
  scale = pj.merging.per_leaf(BASE, {REGEX: [0.0, 1.0]}, default=0.25)
  methods = {
    ".*2.*": pj.merging.wise_ft(alpha=0.75),
    None: pj.merging.task_arithmetic(scale=scale),
  }
  assert same(interop.read("a.safetensors"), pj.merge(BASE, [ONE], methods))
  (models / "recipe.yaml").write_text(
    "models: [one, two]\nmethod: linear\noptions: {weights: [1, 3]}\n"
    "only: ['embed']\nout: b.safetensors\n"
  )
  run("merge", "--config", "recipe.yaml")
  wanted = pj.merge(
    None, [ONE, TWO], pj.merging.linear(weights=[1, 3]), only="embed"
  )
  assert same(interop.read("b.safetensors"), wanted)


def test_versions_and_patches(models):
  repo = pj.Repo.init(models / "runs")
  repo.commit(BASE, message="base")
  repo.branch("tuned")
  repo.commit(ONE, message="one", branch="tuned")
  pj.diff(BASE, TWO, exact=True).save(models / "two.safetensors", base=BASE)
  run(
    *("merge", "runs@tuned", "two.safetensors", "--base", "runs@main"),
    *("--out", "out.safetensors", "--density", "0.5"),
  )
  wanted = pj.merge(BASE, [ONE, TWO], pj.merging.ties(density=0.5))
  assert same(interop.read("out.safetensors"), wanted)
  run(
    *("-C", "runs", "merge", "tuned", "--method", "linear"),
    *("--out", "../c.safetensors"),
  )
  assert same(interop.read("c.safetensors"), ONE)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["one", "--dtype", "float32"], "--dtype needs --out"),
    (["one", "--override", "a:ties"], "--override needs --out"),
    ([], "which versions"),
    (["--out", "x"], "which models"),
    (["one", "--out", "x"], "needs the base"),
    (["nothing", "--out", "x"], "is no file and"),
    (["one", "--out", "x", "--into", "main"], "--into is for merges into"),
    (["one", "--out", "x", "-m", "text"], "--message is for merges into"),
    (["one", "--out", "x", "--override", "ties"], "expected REGEX:METHOD"),
    (["one", "--out", "x", "--override", "a:b {1}"], "--override"),
    (["one", "--out", "x", "--override", ".*:tie"], "did you mean 'ties'"),
    (["one", "--out", "x", "--config", "bad.json"], "'modles'"),
    (["one", "--out", "x", "--config", "worse.json"], "is no recipe"),
    (
      ["one", "--out", "x", "--method", "linear", "--dtype", "int8"],
      "expected one of",
    ),
    (
      ["one", "--out", "x", "--method", "linear", "--shard-size", "5XB"],
      "expected a size",
    ),
  ],
)
def test_what_is_refused(models, arguments, said):
  (models / "bad.json").write_text('{"modles": []}')
  (models / "worse.json").write_text("{")
  assert said in " ".join(run("merge", *arguments, code=2).split())
  assert not (models / "x").exists()
