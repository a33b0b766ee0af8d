"""What all verbs share: the repository, values, output, progress."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
  from patchjax.history import Repo

T = TypeVar("T")

AS_JSON = click.option(
  "--json", "as_json", is_flag=True, help="Print JSON for scripts."
)
AUTHOR = click.option(
  "--author",
  envvar="PATCHJAX_AUTHOR",
  help="By whom; default $PATCHJAX_AUTHOR, else the user's name.",
)


def open_repo() -> Repo:
  """Opens the repository here, or in a parent folder, as git does."""
  from patchjax.history import Repo
  from patchjax.trees.errors import NotARepositoryError

  here = pathlib.Path.cwd()
  try:
    return Repo(here)
  except NotARepositoryError:
    for parent in here.parents:
      with contextlib.suppress(NotARepositoryError):
        return Repo(parent)
    raise


def emit(as_json: bool, value: Any, text: str | Callable[[], str]) -> None:
  """Prints a result, as JSON or for a person.

  Args:
    as_json: whether a script asked.
    value: JSON values.
    text: the same in words, or what makes it; nothing is printed if empty.
  """
  if as_json:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    return
  shown = text() if callable(text) else text
  if shown:
    click.echo(shown)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
  """Shows on stderr that something is going on, from two seconds on.

  Silent where stderr is no terminal.

  Args:
    what: what is going on.
  """
  if not sys.stderr.isatty():
    yield
    return
  from tqdm import tqdm

  done = threading.Event()
  with tqdm(
    desc=what, bar_format="{desc}: {elapsed}", delay=2, leave=False
  ) as bar:

    def tick() -> None:
      while not done.wait(0.5):
        bar.update()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
  """Gives a callback `(what, done, total)` that moves a progress bar on stderr.

  Silent where stderr is no terminal, and in the first two seconds.
  """
  from tqdm import tqdm

  with tqdm(delay=2, leave=False, disable=None) as bar:

    def moved(what: str, done: int, total: int) -> None:
      bar.set_description(what, refresh=False)
      bar.total = total
      bar.n = done
      bar.update(0)

    yield moved


def read_value(text: str) -> Any:
  """Returns the parameters in a file, or at a ref of the repository.

  Args:
    text: a path (see `is_path`), or a ref.
  """
  from patchjax.interop import read

  with waiting(f"reading {text}"):
    return read(text) if is_path(text) else open_repo().checkout(text)


def read_text(path: str) -> str:
  """Returns the text in a file.

  Args:
    path: the file.
  """
  from patchjax.trees.errors import FormatError

  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise FormatError(f"{path}: expected a text file ({error})") from error


def is_path(text: str) -> bool:
  """Returns whether an argument names a file rather than a ref.

  Args:
    text: the argument. A name with a suffix of weights is a file even where
      it does not exist, so that the message is about the file. What could be
      either is refused, as in git.
  """
  if text.endswith((".safetensors", ".npz")):
    return True
  if not pathlib.Path(text).exists():
    return False
  if _is_ref(text):
    raise click.UsageError(
      f"{text!r} is a version and also a file: write ./{text} for the file, "
      f"heads/{text} or tags/{text} for the version"
    )
  return True


def _is_ref(text: str) -> bool:
  from patchjax.trees.errors import NotARepositoryError, RefNotFoundError

  try:
    open_repo().resolve(text)
  except (NotARepositoryError, RefNotFoundError):
    return False
  return True


def is_patch(text: str) -> bool:
  """Returns whether an argument names a patch file, of whatever name.

  Args:
    text: the argument.
  """
  if not pathlib.Path(text).is_file():
    return False
  from patchjax.patches.files import is_patch_file

  return is_patch_file(text)


def patched(base: Any, path: str, *, any_base: bool = False) -> Any:
  """Returns parameters with a patch file applied, as `commit` would store them.

  Args:
    base: nested dicts of arrays.
    path: the patch file.
    any_base: whether any value of the same structure will do.
  """
  from patchjax.patches import Patch, check_base, pinned
  from patchjax.trees.digest import tree_id
  from patchjax.trees.names import named_leaves, nested

  patch = Patch.load(path)
  if any_base:
    patch = patch.replace(base=tree_id(base))
  check_base(base, patch)
  return nested(pinned.apply_named(named_leaves(base), patch))


def load_object(text: str, kind: type[T]) -> T:
  """Returns what an import path names.

  Args:
    text: `module:name`, importable from here; a function is called.
    kind: what it must be.
  """
  import importlib
  import inspect

  module_name, sign, name = text.partition(":")
  if not (sign and name and module_name):
    raise click.BadParameter(f"expected MODULE:NAME, found {text!r}")
  sys.path.insert(0, "")
  try:
    module = importlib.import_module(module_name)
    found = getattr(module, name)
  except (ImportError, AttributeError) as error:
    raise click.BadParameter(f"cannot import {text!r}: {error}") from error
  finally:
    sys.path.remove("")
  if not isinstance(found, kind) and callable(found):
    try:
      inspect.signature(found).bind()
    except (TypeError, ValueError) as error:
      raise click.BadParameter(
        f"{text} must be a {kind.__name__}, or callable without arguments: "
        f"{error}"
      ) from error
    found = found()
  if not isinstance(found, kind):
    raise click.BadParameter(
      f"{text} is a {type(found).__name__}, expected a {kind.__name__}"
    )
  return found
