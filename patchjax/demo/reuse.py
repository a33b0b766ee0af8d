"""Testing a version as fine-tuning would: with stored task patches, or anew.

The test of a pretrained model is how well it does after fine-tuning. The
cheap way is to apply the task patch that was fine-tuned on the release to the
candidate; it costs an evaluation. What fine-tuning again would give is not
less than that, as a rule more: the two are not equivalent.
"""

from typing import Any

import jax
import jax.numpy as jnp

import patchjax as pj
from patchjax.demo import evidence, report, training
from patchjax.demo.desk import MAINTAINERS, Desk
from patchjax.vetting import Verdict, gate


def tasks_of(desk: Desk) -> tuple[str, ...]:
  """The tasks that the release keeps a patch for."""
  return tuple(task for task in evidence.TUNED if task in desk.scorer.tasks)


def fine_tune(desk: Desk, params: Any, task: str) -> pj.Patch:
  """A task patch on a version that shares the release's lower layers."""
  return training.train(
    training.random_patch(desk.scorer, task, desk.config),
    desk.scorer,
    task,
    desk.config,
    rate=desk.config.random_rate,
    base=jax.tree.map(jnp.asarray, params),
  )


def compare(desk: Desk, ref: str) -> None:
  """Shows scores, decisions and costs of both ways on a proposal.

  Args:
    desk: the desk.
    ref: the proposal.
  """
  tasks = tasks_of(desk)
  names = tuple(evidence.tuned_name(task) for task in tasks)
  suite = evidence.part_of(desk.suite, names)
  released = desk.outcomes("v1.0.0").values
  old = suite.outcomes({name: released[name] for name in names})
  params = desk.checkout(ref)
  scoring, tuning, scoring_again = (report.Cost() for _ in range(3))
  stored, fresh = {}, {}
  for task, name in zip(tasks, names):
    with scoring:
      stored[name] = suite[name].evaluate(params)
    with tuning:
      patch = fine_tune(desk, params, task)
    with scoring_again:
      fresh[name] = desk.scorer.outcomes(evidence.patched(params, patch), task)
  policy = evidence.contribution_policy(desk.config)
  decisions = [
    [row.result for row in gate(old, suite.outcomes(new), suite, policy).rows]
    for new in (stored, fresh)
  ]
  rows = [
    [name]
    + [report.interval(scores[name]) for scores in (old.values, stored, fresh)]
    + [decision[i] for decision in decisions]
    for i, name in enumerate(names)
  ]
  columns = ["test", "1.0.0", "stored patch", "fine-tuned again"]
  columns += ["gate, stored", "gate, again"]
  again = tuning.cpu + scoring_again.cpu
  desk.echo(pj.trees.table(columns, rows))
  desk.echo(
    f"with stored patches {scoring.cpu:.1f} CPU-s, all of it evaluation;"
    f" fine-tuning again {tuning.cpu:.1f}, with evaluation {again:.1f} CPU-s:"
    f" {again / scoring.cpu:.1f}x. Not equivalent: a stored patch bounds what"
    " fine-tuning gives from below."
  )
  desk.facts |= {
    "stored patches with evaluation, CPU-s": scoring.cpu,
    "fine-tuning again, CPU-s": tuning.cpu,
    "fine-tuning again with evaluation, CPU-s": again,
    "same decisions": decisions[0] == decisions[1],
  }


def climb(
  desk: Desk, branch: str, verdict: Verdict, claims: tuple[str, ...]
) -> Verdict:
  """Fine-tunes again where only stored task patches stand in the way.

  Not to pass with a stored patch decides nothing yet, for it is a lower
  bound: the next rung of the ladder does.

  Args:
    desk: the desk.
    branch: the candidate, of which there is no other task patch yet.
    verdict: of the gate with stored patches.
    claims: what the gate was asked to show.

  Returns:
    A new verdict, or the same if something else stands in the way.
  """
  failing = {row.test for row in verdict.rows if row.result != "pass"}
  tasks = [t for t in tasks_of(desk) if evidence.tuned_name(t) in failing]
  if len(tasks) < len(failing):
    return verdict
  commit = desk.repo.show(branch)
  params = desk.checkout(branch)
  values = dict(desk.outcomes(branch).values)
  for task in tasks:
    name = evidence.tuned_name(task)
    desk.echo(f"{name} does not pass with the stored patch: fine-tuning again")
    patch = fine_tune(desk, params, task)
    desk.submit(f"tasks/{task}-{branch}", patch, branch, MAINTAINERS)
    desk.patches.add(commit.tree, task, patch)
    values[name] = desk.scorer.outcomes(evidence.patched(params, patch), task)
  desk.keep(desk.suite.outcomes(values, subject=commit.tree))
  return desk.gate("v1.0.0", branch, claims=claims)
