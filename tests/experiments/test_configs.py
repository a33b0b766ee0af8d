"""Configs say what the dataclass says, and refuse what it does not know."""

import dataclasses
import importlib.util
import pathlib

import pytest

from patchjax.demo.config import Config

ROOT = pathlib.Path(__file__).parents[2]


def load(name):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class Hyper:
  """What `get_hyper` is handed: sweeps as lists of dicts."""

  @staticmethod
  def sweep(key, values):
    return [{key: value} for value in values]

  @staticmethod
  def product(sweeps):
    points = [{}]
    for sweep in sweeps:
      points = [{**point, **more} for point in points for more in sweep]
    return points


def test_the_default_is_the_demos():
  given = load("clamp").get_config().to_dict()
  assert Config(**given) == Config()


def test_quick_is_smaller_and_otherwise_the_same():
  quick = Config(**load("clamp").get_config("quick").to_dict())
  assert quick.steps < Config().steps
  changed = {
    field.name
    for field in dataclasses.fields(Config)
    if getattr(quick, field.name) != getattr(Config(), field.name)
  }
  assert not changed & {"task_margin", "slice_margin", "alpha", "power"}


def test_unknown_variants_are_refused():
  with pytest.raises(ValueError, match="slow"):
    load("clamp").get_config("slow")


def test_every_point_of_the_sweep_is_a_config():
  module = load("clamp")
  points = module.get_hyper(Hyper)
  assert len(points) == 3
  for point in points:
    config = module.get_config()
    with config.unlocked():
      config.update_from_flattened_dict(
        {key.removeprefix("config."): value for key, value in point.items()}
      )
    Config(**config.to_dict())
