"""Running the story in a folder, and finding its suite again afterwards."""

import os
import pathlib
import shutil
from collections.abc import Callable

from tqdm import tqdm

from patchjax.demo import data, evidence, model, report, tasks
from patchjax.demo.config import Config
from patchjax.demo.desk import NOTE
from patchjax.demo.scoring import Scorer
from patchjax.demo.story import Story
from patchjax.history import Repo
from patchjax.trees import errors
from patchjax.trees.names import named_leaves
from patchjax.vetting import Policy, Suite


def run(
  directory: str | os.PathLike[str] = "clamp-demo",
  config: Config | None = None,
  *,
  force: bool = False,
  cache: str | os.PathLike[str] | None = None,
  echo: Callable[[str], object] = print,
) -> report.Report:
  """Plays the CLAMP story on MiniLM and writes its repository.

  The first run downloads about 90 MB; see `patchjax.demo.data`.

  Args:
    directory: where the repository goes. If something is there already, it is
      kept and the first free one of `directory-2`, `directory-3`, ... is
      taken.
    config: every number of the story; default `Config()`.
    force: replace a repository that is at `directory` instead.
    cache: folder of the downloads; default `data.cache_dir()`.
    echo: receives what is to be shown.

  Returns:
    A `Report`; `report.problems` is empty if all went as the essay tells.

  Raises:
    RepositoryError: with `force`, if the directory is no repository.
    ConnectionError: the data is neither cached nor to be had.
    ImportError: the extra `demo` is not installed.
  """
  config = Config() if config is None else config
  place = _place(pathlib.Path(directory), force, echo)
  with report.Cost() as cost:
    scorer = _scorer(config, cache, echo)
    story = Story(Repo.init(place), scorer, config, echo)
    story.play()
  found = report.Report(
    directory=str(place),
    lines=tuple(story.lines),
    checkpoint=sum(leaf.nbytes for leaf in named_leaves(scorer.base).values()),
    releases=tuple(story.releases),
    rejected=tuple(story.rejected),
    problems=tuple(story.problems),
    facts=story.facts,
    cost=cost,
  )
  echo(f"\n{found}")
  return found


def _place(
  directory: pathlib.Path, force: bool, echo: Callable[[str], object]
) -> pathlib.Path:
  """A folder for the repository that holds nothing anyone would miss."""
  if not directory.exists() or not any(directory.iterdir()):
    return directory
  if force:
    try:
      Repo(directory)
    except errors.NotARepositoryError as error:
      raise errors.RepositoryError(
        f"{directory} is not empty and no patchjax repository: it is not"
        " replaced; name another directory"
      ) from error
    shutil.rmtree(directory)
    return directory
  number = 2
  while (place := directory.with_name(f"{directory.name}-{number}")).exists():
    number += 1
  echo(f"{directory} is kept as it is; this run writes {place}")
  return place


def _scorer(
  config: Config,
  cache: str | os.PathLike[str] | None,
  echo: Callable[[str], object],
) -> Scorer:
  """The pretrained model and the tasks, with the lower layers run."""
  files = data.fetch(cache, echo=echo)
  found = tasks.load(
    files,
    tokens=config.tokens,
    most=_most(config),
  )
  scorer = Scorer(
    model.load(files["model.safetensors"]),
    found,
    depth=config.depth,
    batch=config.evaluation_batch,
  )
  for name in tqdm(found, desc="lower layers on validation texts", leave=False):
    scorer.warm(name, "validation")
  return scorer


def _most(config: Config) -> dict[str, int]:
  return {
    "train": config.train_texts,
    "validation": config.validation_texts,
    "test": config.test_texts,
  }


def suite() -> Suite:
  """The suite of the demo's repository in the working directory.

  Returns:
    The suite that release 1.0.0 came with: same texts, same digest.

  Raises:
    NotARepositoryError: neither here nor above lies a repository.
    RefNotFoundError: the repository is not the demo's.
  """
  here = pathlib.Path.cwd()
  roots = [place for place in (here, *here.parents) if _is_repository(place)]
  repo = Repo(roots[0] if roots else here)
  notes = repo.annotations("v1.0.0", NOTE)
  if not notes:
    raise errors.RefNotFoundError(
      f"{repo.path} was not written by the demo: its v1.0.0 says nothing of a"
      " suite; run patchjax demo, and vet inside its repository"
    )
  said = notes[-1]["payload"]
  config = Config(tokens=said["tokens"])
  files = data.fetch()
  scorer = Scorer(
    repo.checkout("v1.0.0"),
    tasks.load(files, tokens=config.tokens, most=_most(config)),
    depth=config.depth,
    batch=config.evaluation_batch,
  )
  for task, n in said["sizes"].items():
    scorer.limit(task, n)
  branches = {task: f"tasks/{task}" for task in said["tuned"]}
  patches = evidence.TaskPatches(
    {task: repo.patch_of(branch) for task, branch in branches.items()}
  )
  for branch in repo.branches():
    for task, released in branches.items():
      if branch.startswith(f"{released}-"):
        commit = repo.show(branch)
        tree = repo.show(commit.parents[0]).tree
        patches.add(tree, task, repo.patch_of(branch))
  return evidence.build_suite(
    scorer,
    patches,
    {task: repo.show(branch).tree for task, branch in branches.items()},
  )


def policy() -> Policy:
  """What the maintainers ask of a contribution."""
  return evidence.contribution_policy(Config())


def compression_policy() -> Policy:
  """What the maintainers ask of a compression."""
  return evidence.compression_policy(Config())


def _is_repository(place: pathlib.Path) -> bool:
  try:
    Repo(place)
  except errors.NotARepositoryError:
    return False
  return True
