"""`merge --out`: models merged into files, as options or a recipe say."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import click

from patchjax.cli.common import emit, is_path, open_repo, read_text
from patchjax.cli.methods import merge_method

_KEYS = {
  "base",
  "models",
  "method",
  "options",
  "leaves",
  "dtype",
  "out_dtype",
  "shard_size",
  "only",
  "out",
}
# What lies beside the weights of a model, and is needed to load it.
_BESIDE = (".json", ".txt", ".model", ".jinja")
_SMALL = 64 << 20

_ALL = (
  click.option(
    "--out",
    metavar="DIR|FILE",
    help="Merge models into safetensors files instead; commit nothing.",
  ),
  click.option(
    "--config",
    metavar="FILE",
    help="With --out: a recipe in JSON or YAML, with the keys "
    + ", ".join(sorted(_KEYS))
    + ".",
  ),
  click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="REGEX:METHOD[ {JSON}]",
    help="With --out: another method, with its arguments, for leaves whose "
    "whole name matches; may be repeated, the first match counts.",
  ),
  click.option(
    "--dtype", help="With --out: cast floats to this before merging."
  ),
  click.option("--out-dtype", help="With --out: write floats as this."),
  click.option(
    "--only", multiple=True, metavar="REGEX", help="With --out: merge these."
  ),
  click.option(
    "--shard-size", metavar="SIZE", help="With --out: such as 5GB (default)."
  ),
  click.option(
    "--force", is_flag=True, help="With --out: replace a model that is there."
  ),
)


def options(command: Any) -> Any:
  """Adds the options of merges into files to a command."""
  for option in reversed(_ALL):
    command = option(command)
  return command


def wanted(files: Mapping[str, Any]) -> bool:
  """Returns whether files are to be written.

  Args:
    files: values of `options`.
  """
  if files["out"] or files["config"]:
    return True
  for name, value in files.items():
    if value:
      option = {"overrides": "override"}.get(name, name).replace("_", "-")
      raise click.UsageError(f"--{option} needs --out")
  return False


def merge(
  models: tuple[str, ...],
  base: str | None,
  method: str | None,
  arguments: Mapping[str, Any],
  *,
  out: str | None,
  config: str | None,
  overrides: tuple[str, ...],
  dtype: str | None,
  out_dtype: str | None,
  only: tuple[str, ...],
  shard_size: str | None,
  force: bool,
  as_json: bool,
) -> None:
  """Merges models into files, and says what was written.

  Args:
    models: paths, or versions.
    base: the same; None for the recipe's, or none.
    method: name of the method; None for the recipe's, or ties.
    arguments: of the method, on top of the recipe's.
    out: see `options`, as all that follows.
    config: file of the recipe.
    overrides: methods for some leaves; they come before the recipe's.
    dtype: dtype of the inputs.
    out_dtype: dtype of the result.
    only: which leaves.
    shard_size: size of a file.
    force: whether a model may be replaced.
    as_json: whether a script asked.
  """
  from patchjax.merging import abstract_of, merge_files
  from patchjax.merging.streaming.layout import parse_size

  recipe = {} if config is None else _recipe(config)
  sources = list(models) or recipe.get("models") or []
  start = base if base is not None else recipe.get("base")
  target = out or recipe.get("out")
  if not sources:
    raise click.UsageError("which models? name them, or in the recipe")
  if target is None:
    raise click.UsageError("where to? name --out DIR, or in the recipe")
  _check_free(pathlib.Path(target), force)
  opened = list(map(_open, sources))
  opened_base = None if start is None else _open(start)
  params = abstract_of(opened[0] if opened_base is None else opened_base)
  parts = dict(map(_override, overrides)) | dict(recipe.get("leaves") or {})
  methods = {
    regex: _method(part, params, f"leaves {regex!r}")
    for regex, part in parts.items()
  }
  # Arguments of the recipe are those of its own method.
  same = method is None or method == recipe.get("method", "ties")
  options = dict(recipe.get("options") or {}) if same else {}
  whole = {
    "method": method or recipe.get("method", "ties"),
    "options": options | dict(arguments),
  }
  methods[None] = _method(whole, params, "the recipe")
  size = shard_size or recipe.get("shard_size")
  try:
    done = merge_files(
      opened_base,
      opened,
      methods if len(methods) > 1 else methods[None],
      target,
      only=list(only) or recipe.get("only"),
      dtype=dtype or recipe.get("dtype"),
      out_dtype=out_dtype or recipe.get("out_dtype"),
      shard_bytes=None if size is None else parse_size(size),
    )
  except ValueError as error:
    if type(error) is not ValueError:
      raise
    raise click.UsageError(str(error)) from error
  _bring(start or sources[0], pathlib.Path(target))
  value = {
    "files": [str(path) for path in done.paths],
    "read": done.read,
    "written": done.written,
    "resumed": done.resumed,
  }
  resumed = f" ({_bytes(done.resumed)} of it before)" if done.resumed else ""
  emit(
    as_json,
    value,
    f"merged {len(sources)} models into {target}: "
    f"{_bytes(done.written)}{resumed}, {_bytes(done.read)} read",
  )


def _recipe(path: str) -> dict[str, Any]:
  text = read_text(path)
  try:
    if path.endswith(".json"):
      found = json.loads(text)
    else:
      import yaml

      try:
        found = yaml.safe_load(text)
      except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
  except ImportError as error:
    raise click.UsageError("a recipe in YAML needs pyyaml; use JSON") from error
  except ValueError as error:
    raise click.BadParameter(
      f"{path} is no recipe: {error}", param_hint="--config"
    ) from error
  if not isinstance(found, dict) or found.keys() - _KEYS:
    what = (
      ", ".join(map(repr, found.keys() - _KEYS))
      if isinstance(found, dict)
      else type(found).__name__
    )
    raise click.BadParameter(
      f"{path}: expected a recipe with the keys {', '.join(sorted(_KEYS))}; "
      f"found {what}",
      param_hint="--config",
    )
  return found


def _override(text: str) -> tuple[str, dict[str, Any]]:
  """Returns the leaves and the method of `REGEX:METHOD {JSON}`."""
  head, brace, rest = text.partition(" {")
  regex, sign, name = head.rpartition(":")
  try:
    options = json.loads(brace.strip() + rest) if brace else {}
  except ValueError as error:
    raise click.BadParameter(
      f"{text!r}: {error}", param_hint="--override"
    ) from error
  if not (sign and regex and name):
    raise click.BadParameter(
      f"expected REGEX:METHOD, found {text!r}", param_hint="--override"
    )
  return regex, {"method": name, "options": options}


def _method(part: Any, params: Any, what: str) -> Any:
  """Returns the method of a recipe, or of some of its leaves."""
  from patchjax.merging import per_leaf

  if isinstance(part, str):
    part = {"method": part}
  if not isinstance(part, Mapping) or part.keys() - {"method", "options"}:
    raise click.BadParameter(
      f"{what}: expected a method and its options, found {part!r}"
    )
  options: dict[str, Any] = {}
  for name, value in (part.get("options") or {}).items():
    if isinstance(value, Mapping):
      rules = {k: v for k, v in value.items() if k != "default"}
      value = per_leaf(params, rules, default=value.get("default"))
    options[name] = value
  return merge_method(part.get("method", "ties"), options)


def _open(text: str) -> Any:
  """Returns a path, or a version that is read where it is touched."""
  from patchjax.history import Repo
  from patchjax.trees.errors import NotARepositoryError

  if not isinstance(text, str):
    raise click.BadParameter(f"expected a path or a version, found {text!r}")
  if is_path(text):
    return text
  place, sign, ref = text.rpartition("@")
  if sign and (pathlib.Path(place) / "patchjax.json").exists():
    return Repo(place).open(ref)
  try:
    return open_repo().open(text)
  except NotARepositoryError as error:
    raise click.BadParameter(
      f"{text!r} is no file and, without a repository here, no version"
    ) from error


def _check_free(out: pathlib.Path, force: bool) -> None:
  if out.is_dir():
    found = sorted(out.glob("*.safetensors"))
    # An unfinished merge goes on, also while its files take their places.
    taken = bool(found) and not list(out.glob(".*.merging"))
  else:
    taken = out.exists()
  if taken and not force:
    raise click.UsageError(
      f"{out} holds a model; choose another place, or --force"
    )


def _bring(source: str, out: pathlib.Path) -> None:
  """Copies what a model needs beside its weights, where both are folders."""
  folder = pathlib.Path(source)
  if not (folder.is_dir() and out.is_dir()):
    return
  for path in folder.iterdir():
    if path.suffix not in _BESIDE or path.name.endswith(".index.json"):
      continue
    if path.stat().st_size < _SMALL and not (out / path.name).exists():
      shutil.copyfile(path, out / path.name)


def _bytes(count: int) -> str:
  number, unit = float(count), "B"
  for larger in ("kB", "MB", "GB", "TB"):
    if number < 1000:
      break
    number, unit = number / 1000, larger
  return f"{number:.1f} {unit}" if unit != "B" else f"{count} B"
