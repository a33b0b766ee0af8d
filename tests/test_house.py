"""The rules of the house: who imports whom, what starts, what is documented."""

import ast
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import patchjax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "patchjax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Data flows downwards: a folder imports only from folders before it.
FLOORS = (
  "trees",
  "patches",
  "statistics",
  "tuning",
  "merging",
  "history",
  "vetting",
  "releases",
  "interop",
  "views",
  "cli",
  "demo",
)
FLAT = [name for name in dir(patchjax) if name not in FLOORS]
# Frameworks and heavy parts that are imported where they are used, if at all.
GUESTS = {
  "flax",
  "haiku",
  "equinox",
  "chex",
  "gin",
  "ml_collections",
  "torch",
  "tensorflow",
  "tokenizers",
  "matplotlib",
  "treescope",
}
# The command says `patchjax demo` for the folder below it.
ALLOWED = {("cli", "demo")}


def imports(path):
  """Yields (module, whether at module level) of what a file imports."""
  tree = ast.parse(path.read_text())
  top = set()
  pending = list(tree.body)
  while pending:
    node = pending.pop()
    top.add(node)
    # A module level `if TYPE_CHECKING:` is for the type checker alone.
    if isinstance(node, ast.Try) or (
      isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
    ):
      pending += [
        child
        for child in ast.iter_child_nodes(node)
        if isinstance(child, ast.stmt)
      ]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node in top
    elif isinstance(node, ast.ImportFrom):
      yield node.module, node in top
      for alias in node.names:
        yield f"{node.module}.{alias.name}", node in top


def floor(path):
  parts = path.relative_to(PACKAGE).parts
  return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_imports_only_from_folders_above_it(path):
  here = floor(path)
  if here is None:  # patchjax/__init__.py names all
    return
  assert here in FLOORS
  for module, _ in imports(path):
    match = re.match(r"patchjax\.(\w+)", module)
    if match and match[1] in FLOORS:
      fine = FLOORS.index(match[1]) <= FLOORS.index(here)
      assert fine or (here, match[1]) in ALLOWED, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_framework_is_imported_at_module_level(path):
  for module, top in imports(path):
    assert not (top and module.split(".")[0] in GUESTS), f"{path}: {module}"


def test_nothing_reaches_into_private_parts_of_jax_or_unpickles():
  word = re.compile(r"jax\._src|\bpickle\.load|allow_pickle=True|\beval\(")
  found = [p for p in FILES if word.search(p.read_text())]
  assert found == []


def test_importing_patchjax_starts_no_device():
  modules = [
    name
    for _, name, _ in pkgutil.walk_packages(patchjax.__path__, "patchjax.")
    if not name.endswith("__main__")
  ]
  names = [*modules, *(f"patchjax.{name}" for name in FLAT)]
  code = f"""
import importlib, sys
import patchjax
assert "jax" not in sys.modules and "numpy" not in sys.modules
for name in {names!r}:
  try:
    importlib.import_module(name)
  except ModuleNotFoundError:
    module, _, attribute = name.rpartition(".")
    getattr(importlib.import_module(module), attribute)
from jax.extend import backend
import jax
jax.config.update("jax_platforms", "no_such_platform")
try:
  backend.backends()
except RuntimeError:
  print("no device was started")
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.stdout == "no device was started\n", done.stderr


def test_the_flat_names_are_there():
  assert len(dir(patchjax)) == len(set(dir(patchjax)))
  for name in FLAT:
    assert getattr(patchjax, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = patchjax.nothing


def test_the_version_is_that_of_the_package():
  import tomllib

  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert patchjax.__version__ == project["version"]


def test_the_top_level_holds_nothing_else():
  done = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
  )
  if done.returncode:
    pytest.skip("not a git checkout")
  top = {line.split("/")[0] for line in done.stdout.splitlines()}
  known = {"patchjax", "experiments", "configs", "tests", "pyproject.toml"}
  known |= {"README.md", "LICENSE", "CHANGELOG.md"}
  assert {name for name in top if not name.startswith(".")} <= known


def public_functions():
  """Yields (name, node) of public functions and classes of all modules."""
  for path in FILES:
    where = path.relative_to(ROOT)
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        if not node.name.startswith("_"):
          yield f"{where}:{node.name}", node


@pytest.mark.parametrize(
  "node", [pytest.param(node, id=name) for name, node in public_functions()]
)
def test_what_is_public_has_a_docstring(node):
  assert ast.get_docstring(node)
  if isinstance(node, ast.ClassDef):
    for method in node.body:
      public = isinstance(method, ast.FunctionDef) and not (
        # tree_flatten and its like are JAX's protocol.
        method.name.startswith(("_", "tree_"))
      )
      # What overrides is described where it is declared.
      if public and not node.bases:
        assert ast.get_docstring(method), f"{node.name}.{method.name}"


@pytest.mark.parametrize("name", FLAT)
def test_the_functions_of_the_flat_api_have_examples(name):
  thing = getattr(patchjax, name)
  if inspect.isfunction(thing):
    assert ">>> " in (inspect.getdoc(thing) or "")
