"""What the maintainers of CLAMP demand: the suite, its sizes, its policies."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import patchjax as pj
from patchjax.demo import model
from patchjax.demo.config import Config
from patchjax.demo.scoring import Scorer
from patchjax.demo.tasks import SENTIMENT
from patchjax.patches import pinned
from patchjax.vetting import Policy, Suite, Test, plan

TUNED = ("amazon", "nyt")
"""Tasks that the release keeps a task patch for."""


def tuned_name(task: str) -> str:
  """Name of the test of a task with its stored task patch applied."""
  return f"{task}-tuned"


def patched(params: model.Params, patch: pj.Patch) -> model.Params:
  """Parameters with a patch applied on the host, as a commit would do it.

  `pj.apply` compiles a function for every shape of a sparse patch, which
  pays in training; to score a patch once, this is faster.
  """
  named = {
    name: np.asarray(leaf)
    for name, leaf in pj.trees.named_leaves(params).items()
  }
  return pj.trees.nested(dict(pinned.apply_named(named, patch)))


class TaskPatches:
  """Stored task patches: those of the release, and those of later versions.

  A version without patches of its own borrows those of the first release, so
  that testing it costs an evaluation and no fine-tuning.
  """

  def __init__(self, released: Mapping[str, pj.Patch]):
    self._released = dict(released)
    self._own: dict[str, dict[str, pj.Patch]] = {}

  def add(self, tree: str, task: str, patch: pj.Patch) -> None:
    """Keeps the patch that was fine-tuned on the version with this tree id."""
    self._own.setdefault(tree, {})[task] = patch

  def find(self, params: model.Params, task: str) -> pj.Patch:
    """The patch to use on a version."""
    if not self._own:
      return self._released[task]
    own = self._own.get(pj.trees.tree_id(params), {})
    return own.get(task, self._released[task])


def digest_of(scorer: Scorer, task: str) -> str:
  """Identifies the test texts of a task, their labels and the question."""
  texts = scorer.tasks[task].test
  hashed = hashlib.sha256()
  prompts = scorer.tasks[task].prompts.ids
  for array in (prompts, texts.ids, texts.mask, texts.labels):
    hashed.update(np.ascontiguousarray(array).tobytes())
  return hashed.hexdigest()


def build_suite(scorer: Scorer, patches: TaskPatches, stored: Any) -> Suite:
  """The suite: five zero-shot tasks with class slices, two with task patches.

  Args:
    scorer: scores the tasks on their test texts.
    patches: the stored task patches.
    stored: tree id of the released model with each task patch; part of what
      identifies the suite.

  Returns:
    The suite. Slices are the classes of the two-class tasks; those of `bbc`
    would have too few texts to decide anything.
  """

  def zero_shot(task: str) -> Test:
    labels = scorer.tasks[task].test.labels
    classes = scorer.tasks[task].classes if task in SENTIMENT else ()
    return Test(
      task,
      lambda params: scorer.outcomes(params, task),
      slices={
        name: labels == index
        for index, name in enumerate(classes)
        if np.any(labels == index)
      },
      data=digest_of(scorer, task),
    )

  def tuned(task: str) -> Test:
    return Test(
      tuned_name(task),
      lambda params: scorer.outcomes(
        patched(params, patches.find(params, task)), task
      ),
      data=f"{digest_of(scorer, task)} {stored[task]}",
    )

  tests = [zero_shot(task) for task in scorer.tasks]
  tests += [tuned(task) for task in stored]
  return Suite("clamp", "1.0.0", tests)


def contribution_policy(config: Config) -> Policy:
  """What a contribution must show against the release."""
  return Policy(
    margin=config.task_margin,
    slice_margin=config.class_margin,
    flips=config.flips,
    slice_flips=1.0,
    alpha=config.alpha,
    power=config.power,
  )


def compression_policy(config: Config) -> Policy:
  """A compression promises the same model: it must hold slice by slice."""
  return Policy(
    margin=config.task_margin,
    slice_margin=config.slice_margin,
    flips=config.compressed_flips,
    alpha=config.alpha,
    power=config.power,
  )


def parent_policy(config: Config) -> Policy:
  """What a merge must keep of what each parent claimed."""
  return Policy(
    margin=config.parent_margin,
    flips=None,
    alpha=config.alpha,
    power=config.power,
  )


def part_of(suite: Suite, names: Mapping[str, Any] | tuple[str, ...]) -> Suite:
  """The suite with some of its tests only, without their slices."""
  tests = [
    Test(name, suite[name].evaluate, data=suite[name].data) for name in names
  ]
  return Suite(f"{suite.name}/{'+'.join(names)}", suite.version, tests)


def planned_sizes(
  discordance: Mapping[str, float], claimed: tuple[str, ...], config: Config
) -> dict[str, int]:
  """How many test texts each task needs.

  Args:
    discordance: by task, the share of texts on which a trained version and
      the release are expected to differ.
    claimed: tasks that a merge must keep within the smaller margin.
    config: margins and error rates.

  Returns:
    Number of texts by task, as `patchjax.vetting.plan` gives it.
  """
  aim = functools.partial(plan, alpha=config.alpha, power=config.power)
  sizes = {}
  for task, share in discordance.items():
    sizes[task] = aim(config.task_margin, max(share, 0.01))
    if task in claimed:
      needed = aim(
        config.parent_margin,
        config.parent_discordance,
        difference=config.parent_difference,
      )
      sizes[task] = max(sizes[task], needed)
  return sizes
