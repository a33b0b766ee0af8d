"""The verb conflicts, as a user types it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import patchjax as pj
from patchjax import interop
from patchjax.cli.app import patchjax

BASE = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(2, np.float32)}
DUCK = {"w": BASE["w"] + np.float32(1), "b": BASE["b"]}
FID = {"w": BASE["w"], "b": BASE["b"] + np.float32(2)}


@pytest.fixture
def work(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, value in {"base": BASE, "duck": DUCK}.items():
    interop.write(f"{name}.safetensors", value)
  pj.diff(BASE, FID).save("fix.safetensors", base=BASE)
  repo = pj.Repo.init("repo")
  repo.commit(BASE, message="pretrained")
  for name, value in {"duck": DUCK, "fid": FID}.items():
    repo.branch(name)
    repo.commit(value, message=name, branch=name)
  return tmp_path


def run(*arguments, code=0):
  result = CliRunner().invoke(patchjax, [str(a) for a in arguments])
  assert result.exit_code == code, result.output + repr(result.exception)
  return result.stderr if code == 2 else result.stdout


def test_refs_from_their_merge_base(work):
  text = run("-C", "repo", "conflicts", "duck", "fid")
  assert "duck, fid" in text and "disjoint: no entry is changed twice" in text
  both = json.loads(run("-C", "repo", "conflicts", "duck", "fid", "--json"))
  assert both["contributors"] == ["duck", "fid"] and both["disjoint"]
  assert both["total"]["entries"] == [[12, 0], [0, 2]]
  one = run("-C", "repo", "conflicts", "duck", "fid", "--only", "b", "--json")
  assert json.loads(one)["total"]["size"] == 2


def test_files_and_patches_from_a_base(work):
  sides = ("duck.safetensors", "fix.safetensors")
  text = run("conflicts", *sides, "--base", "base.safetensors", "--json")
  assert json.loads(text)["total"]["entries"] == [[12, 0], [0, 2]]
  assert "say with --base" in run("conflicts", *sides, code=2)


def test_a_heat_map_is_written(work):
  pytest.importorskip("matplotlib")
  refs = ("-C", "repo", "conflicts", "duck", "fid")
  run(*refs, "--heat-map", "../out.png", "--of", "overlap")
  assert (work / "out.png").read_bytes()[:4] == b"\x89PNG"
  message = run(*refs, "--heat-map", "out.txt", code=2)
  assert "ends with .png, .svg, .pdf" in message


def test_a_merge_that_is_only_tried_names_its_sides(work):
  text = run("-C", "repo", "merge", "duck", "--into", "fid", "--dry-run")
  duck = pj.Repo("repo").resolve("duck")[:12]
  assert duck in text
