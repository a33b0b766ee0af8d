"""The CLAMP story on a real model: released, patched, merged, vetted.

The names are those of the essay "Building machine learning models like an
open-source project" (Raffel, 2021). Nothing here decides an outcome: each
verdict comes from the gate, under policies that `config` fixed beforehand,
and where the data refuses what the essay tells, the story says so and goes on.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import patchjax as pj
from patchjax.demo import evidence, report, training
from patchjax.demo.config import Config
from patchjax.demo.scoring import Scorer
from patchjax.history import Repo
from patchjax.patches import Delta
from patchjax.vetting import (
  Outcomes,
  Policy,
  Suite,
  Verdict,
  gate,
  record,
  uses,
)

SALBAN = "Salban University"
DUCKSVILLE = "University of Ducksville"
FIDMOR = "Fidmor Foundation"
CHAKRABORTY = "Chakraborty Institute"
MAINTAINERS = "CLAMP maintainers"

NOTE = "demo"
"""Kind of the annotation from which `patchjax.demo.suite` finds its parts."""


class Story:
  """The maintainers' desk: a repository, a suite, and what has been scored.

  Args:
    repo: an empty repository.
    scorer: the pretrained model and the tasks.
    config: every number.
    echo: receives what is to be shown, line by line.
  """

  def __init__(
    self,
    repo: Repo,
    scorer: Scorer,
    config: Config,
    echo: Callable[[str], object] = print,
  ):
    self.repo = repo
    self.scorer = scorer
    self.config = config
    self.echo = echo
    self.patches: evidence.TaskPatches
    self.suite: Suite
    self.lines: list[report.Line] = []
    self.releases: list[str] = []
    self.rejected: list[str] = []
    self.problems: list[str] = []
    self.facts: dict[str, Any] = {}
    self._known: dict[str, Outcomes] = {}
    self._folder = tempfile.TemporaryDirectory(prefix="patchjax-demo-")

  def play(self) -> None:
    """Runs the events in order."""
    with self._folder:
      self.salban()
      self.ducksville()
      self.fidmor()
      self.chakraborty()

  # Event 1.

  def salban(self) -> None:
    """Releases 1.0.0 with a suite and task patches."""
    self._title(f"1. {SALBAN} releases the model with a suite")
    config, scorer = self.config, self.scorer
    self.repo.commit(scorer.base, message="pretrained model", author=SALBAN)
    trees, patches = {}, {}
    cost = report.Cost()
    for task in self._tuned():
      with cost:
        patch = training.random_patch(scorer, task, config)
        patch = training.train(
          patch, scorer, task, config, rate=config.random_rate
        )
      patches[task] = self._submit(f"tasks/{task}", patch, "main", SALBAN)
      trees[task] = self.repo.show(f"tasks/{task}").tree
    self.facts["task patches, CPU-s"] = cost.cpu
    self.echo(f"task patches for {', '.join(patches)}: {cost}")
    sizes = self._plan(patches)
    for task, n in sizes.items():
      scorer.limit(task, n)
    self.patches = evidence.TaskPatches(patches)
    self.suite = evidence.build_suite(scorer, self.patches, trees)
    first = pj.release(self.repo, "main", suite=self.suite)
    self.repo.annotate(
      first.commit,
      NOTE,
      {"sizes": sizes, "tuned": list(patches), "tokens": config.tokens},
      author=SALBAN,
    )
    self.releases.append(first.version)
    outcomes = self._outcomes("main")
    self._line(first.tag, SALBAN, "checkpoint", None, outcomes, "released")
    self.echo(f"released {first.version} with suite {self.suite.label}")

  def _tuned(self) -> tuple[str, ...]:
    return tuple(task for task in evidence.TUNED if task in self.scorer.tasks)

  def _plan(self, patches: dict[str, pj.Patch]) -> dict[str, int]:
    """Sizes of the tests, planned from what the task patches do elsewhere."""
    scorer = self.scorer
    shares = dict.fromkeys(scorer.tasks, 0.0)
    versions = [
      evidence.patched(scorer.base, patch) for patch in patches.values()
    ]
    for task in scorer.tasks:
      before = scorer.outcomes(scorer.base, task, "validation")
      for params in versions:
        after = scorer.outcomes(params, task, "validation")
        shares[task] = max(shares[task], float(np.mean(before != after)))
    needed = evidence.planned_sizes(shares, ("tweets", "bbc"), self.config)
    sizes, rows = {}, []
    for task, n in needed.items():
      sizes[task] = min(n, len(scorer.tasks[task].test))
      rows.append([task, f"{shares[task]:.3f}", n, sizes[task]])
    self.echo(
      pj.trees.table(
        ["task", "expected discordance", "planned n", "n"],
        rows,
        title="test texts, planned from what task patches change in validation",
      )
    )
    return sizes

  # Events 2 and 3.

  def ducksville(self) -> None:
    """A sparse patch for the tweets, checked with stored task patches."""
    self._title(f"2. {DUCKSVILLE} trains a sparse patch on tweets")
    config, scorer = self.config, self.scorer
    found = {}
    for kind, rate in (
      ("FISH", config.fish_rate),
      ("random mask", config.random_rate),
    ):
      with report.Cost() as cost:
        make = training.fish_patch if kind == "FISH" else training.random_patch
        found[kind] = training.train(
          make(scorer, "tweets", config),
          scorer,
          "tweets",
          config,
          rate=rate,
          keep="bbc",
        )
      params = evidence.patched(scorer.base, found[kind])
      right = scorer.outcomes(params, "tweets", "validation")
      zero = scorer.outcomes(scorer.base, "tweets", "validation")
      self.facts[f"{kind}, validation gain"] = right.mean() - zero.mean()
      self.echo(
        f"{kind}: validation {100 * zero.mean():.1f} ->"
        f" {report.interval(right)} on tweets; {cost}"
      )
    self._submit("ducksville", found["FISH"], "v1.0.0", DUCKSVILLE)
    self._title("3. The maintainers check it")
    self._reuse_or_retrain("ducksville")
    verdict = self._gate("v1.0.0", "ducksville", claims=("tweets",))
    self._line_of("ducksville", DUCKSVILLE, "FISH 0.5 %", verdict)
    if verdict.accepted:
      self.repo.merge("main", ["ducksville"], method=pj.merging.linear())
      self.echo("merged into main; not released yet")
    else:
      self.problems.append("the gate did not accept Ducksville's patch")
    control = self._branch_patch("ducksville-random", found["random mask"])
    self._line(
      "ducksville-random",
      DUCKSVILLE,
      "random 0.5 %",
      control,
      {
        "tweets": scorer.outcomes(
          self.repo.checkout("ducksville-random"), "tweets"
        )
      },
      "control",
    )

  def _branch_patch(self, branch: str, patch: pj.Patch) -> int:
    self._submit(branch, patch, "v1.0.0", DUCKSVILLE)
    return self._nbytes(branch)

  def _reuse_or_retrain(self, ref: str) -> None:
    """The proposal with stored task patches, and with fine-tuned new ones."""
    config, scorer = self.config, self.scorer
    params = self.repo.checkout(ref)
    names = tuple(evidence.tuned_name(task) for task in self._tuned())
    suite = evidence.part_of(self.suite, names)
    policy = evidence.contribution_policy(config)
    old = suite.outcomes(
      {name: self._outcomes("v1.0.0").values[name] for name in names}
    )
    reuse, tuning, scoring = report.Cost(), report.Cost(), report.Cost()
    stored, fresh = {}, {}
    for task, name in zip(self._tuned(), names):
      with reuse:
        stored[name] = suite[name].evaluate(params)
      with tuning:
        patch = self._retrain(params, task)
      with scoring:
        fresh[name] = scorer.outcomes(evidence.patched(params, patch), task)
    verdicts = [
      gate(old, suite.outcomes(values), suite, policy)
      for values in (stored, fresh)
    ]
    rows = [
      [
        name,
        report.interval(old.values[name]),
        report.interval(stored[name]),
        report.interval(fresh[name]),
        *(verdict.rows[i].result for verdict in verdicts),
      ]
      for i, name in enumerate(names)
    ]
    self.echo(
      pj.trees.table(
        ["test", "v1.0.0", "stored patch", "fine-tuned again"]
        + ["gate, stored", "gate, again"],
        rows,
        title="re-using stored task patches is a lower bound of fine-tuning",
      )
    )
    again = tuning.cpu + scoring.cpu
    self.echo(
      f"re-use: {reuse.cpu:.1f} CPU-s, all of it evaluation; fine-tuning"
      f" again: {tuning.cpu:.1f} CPU-s, with evaluation {again:.1f} CPU-s:"
      f" {again / reuse.cpu:.1f}x"
    )
    self.facts |= {
      "re-use, CPU-s": reuse.cpu,
      "fine-tuning, CPU-s": tuning.cpu,
      "fine-tuning with evaluation, CPU-s": again,
      "same decisions": [row.result for row in verdicts[0].rows]
      == [row.result for row in verdicts[1].rows],
    }

  def _retrain(self, params: Any, task: str) -> pj.Patch:
    return training.train(
      training.random_patch(self.scorer, task, self.config),
      self.scorer,
      task,
      self.config,
      rate=self.config.random_rate,
      base=jax.tree.map(jax.numpy.asarray, params),
    )

  # Event 4.

  def fidmor(self) -> None:
    """A patch made in parallel, refused alone, merged, released as 1.0.1."""
    self._title(f"4. {FIDMOR} trained in parallel, on news topics")
    config, scorer = self.config, self.scorer
    patch = training.train(
      training.fish_patch(scorer, "bbc", config),
      scorer,
      "bbc",
      config,
      rate=config.fish_rate,
    )
    self._submit("fidmor", patch, "v1.0.0", FIDMOR)
    alone = self._gate("v1.0.0", "fidmor", claims=("bbc",))
    self._line_of("fidmor", FIDMOR, "FISH 0.5 %", alone)
    if alone.accepted:
      self.problems.append("the gate accepted Fidmor's patch alone")
    base = self.repo.checkout("v1.0.0")
    parents = [self.repo.checkout(ref) for ref in ("ducksville", "fidmor")]
    found = pj.merging.conflicts(base, parents)
    total = found.total
    self.echo(
      f"merging both: they change {total.changed:.3%} of the entries,"
      f" {total.overlap:.1%} of these both; opposite signs hold"
      f" {total.sign:.1%} of the magnitude; cosine {total.cosine:+.3f}"
    )
    self.facts["mask overlap"] = total.overlap
    for branch in self._merges():
      if self._try_merge(branch):
        return
    self.problems.append("no merge passed, so there is no 1.0.1")

  def _merges(self) -> list[str]:
    """Merges by several methods, the best in validation first."""
    methods = {
      "sum": pj.merging.task_arithmetic(),
      "ties": pj.merging.ties(density=1.0),
      "sum-0.7": pj.merging.task_arithmetic(scale=0.7),
    }
    scores = {}
    for name, method in methods.items():
      branch = f"merge-{name}"
      self.repo.branch(branch, at="ducksville")
      self.repo.merge(
        branch,
        ["fidmor"],
        method=method,
        message=f"Merge fidmor by {name}",
        author=MAINTAINERS,
      )
      params = self.repo.checkout(branch)
      scores[branch] = float(
        np.mean(
          [
            self.scorer.outcomes(params, task, "validation").mean()
            for task in self.scorer.tasks
          ]
        )
      )
    order = sorted(scores, key=lambda branch: -scores[branch])
    shown = ", ".join(f"{b} {100 * scores[b]:.1f}" for b in order)
    self.echo(f"merges by mean validation score: {shown}")
    return order

  def _try_merge(self, branch: str) -> bool:
    """Gates a merge against the release and against each parent's claim."""
    claims = {"ducksville": "tweets", "fidmor": "bbc"}
    verdict = self._gate("v1.0.0", branch, claims=tuple(claims.values()))
    if not verdict.accepted:
      verdict = self._climb(branch, verdict, tuple(claims.values()))
    passed = verdict.accepted
    for parent, task in claims.items():
      suite = evidence.part_of(self.suite, (task,))
      old, new = (
        suite.outcomes({task: outcomes.values[task]}, subject=outcomes.subject)
        for outcomes in (self._outcomes(parent), self._outcomes(branch))
      )
      against = gate(old, new, suite, evidence.parent_policy(self.config))
      record(self.repo, branch, against)
      row = against.rows[0]
      self.echo(
        f"{branch} against {parent} on {task}: {row.difference:+.3f}"
        f" ({row.lost} lost, {row.gained} gained), {row.result}"
      )
      passed = passed and against.accepted
    if not passed:
      self._line_of(branch, MAINTAINERS, "merge", verdict, failed=True)
      return False
    self.repo.merge("main", [branch], method=pj.merging.linear())
    made = pj.release(self.repo, "main", suite=self.suite)
    self.releases.append(made.version)
    self.echo(str(made))
    self._line_of(
      branch, MAINTAINERS, f"merge ({branch[6:]})", verdict, version=made.tag
    )
    return True

  def _climb(
    self, branch: str, verdict: Verdict, claims: tuple[str, ...]
  ) -> Verdict:
    """Fine-tunes again where only re-used task patches stand in the way.

    A stored patch bounds what fine-tuning gives from below, so not passing
    with it decides nothing yet: the next rung of the ladder does.
    """
    open_rows = {row.test for row in verdict.rows if row.result != "pass"}
    tasks = [t for t in self._tuned() if evidence.tuned_name(t) in open_rows]
    if len(tasks) < len(open_rows):
      return verdict
    tree = self.repo.show(branch).tree
    params = self.repo.checkout(branch)
    values = dict(self._outcomes(branch).values)
    for task in tasks:
      name = evidence.tuned_name(task)
      self.echo(f"{name} is open with the stored patch: fine-tuning again")
      patch = self._retrain(params, task)
      self._submit(f"tasks/{task}-{branch}", patch, branch, MAINTAINERS)
      self.patches.add(tree, task, patch)
      values[name] = self.scorer.outcomes(evidence.patched(params, patch), task)
    self._known[tree] = self.suite.outcomes(values, subject=tree)
    return self._gate("v1.0.0", branch, claims=claims)

  # Event 6.

  def chakraborty(self) -> None:
    """Compressions of the release: within a point in mean, yet rejected?"""
    self._title(f"6. {CHAKRABORTY} compresses the release")
    release = f"v{self.releases[-1]}"
    base = self.repo.checkout(release)
    kernels = pj.select(base, "layers/.*/kernel")
    leaves = pj.trees.named_leaves(base)
    decided = []
    for bits in self.config.bits:
      branch = f"chakraborty-{bits}bit"
      codes = {
        name: pj.patches.quantized(leaves[name], bits=bits) for name in kernels
      }
      patch = pj.Patch(
        {name: Delta(code, "set") for name, code in codes.items()},
        pj.patches.structure_of(base),
      )
      self._submit(branch, patch, release, CHAKRABORTY)
      policy = evidence.compression_policy(self.config)
      verdict = self._gate(release, branch, policy=policy)
      old, new = self._outcomes(release), self._outcomes(branch)
      mean = float(
        np.mean(
          [new.values[t].mean() - old.values[t].mean() for t in self._zero()]
        )
      )
      within = "within" if mean >= -self.config.mean_margin else "not within"
      self.echo(
        f"{bits} bits a weight: mean score {100 * mean:+.2f} points, {within}"
        f" {100 * self.config.mean_margin:g} of {release}: {verdict.outcome}"
      )
      self._line_of(branch, CHAKRABORTY, f"{bits}-bit weights", verdict)
      slices = [
        row for row in verdict.rows if row.slice and row.result == "fail"
      ]
      decided.append((verdict.accepted, within == "within" and bool(slices)))
    if not decided[0][1]:
      self.problems.append(
        "the bold compression is not one that only slices give away"
      )
    if not any(accepted for accepted, _ in decided):
      self.problems.append("no compression passed")

  def _zero(self) -> list[str]:
    return list(self.scorer.tasks)

  # What all events use.

  def _title(self, text: str) -> None:
    self.echo(f"\n{text}")

  def _submit(
    self, branch: str, patch: pj.Patch, on: str, author: str
  ) -> pj.Patch:
    """Writes a patch file, as a contributor would, and commits the file."""
    path = pathlib.Path(self._folder.name, branch.replace("/", "-"))
    path = path.with_suffix(".safetensors")
    patch = patch.replace(base=self.repo.show(on).tree)
    patch.save(path)
    self.repo.branch(branch, at=on)
    self.repo.commit(
      path, message=f"Patch of {author}", branch=branch, author=author
    )
    self.facts[f"{branch}, bytes"] = path.stat().st_size
    self.echo(f"{branch}: a file of {path.stat().st_size:,} bytes")
    return patch

  def _nbytes(self, branch: str) -> int:
    return self.facts[f"{branch}, bytes"]

  def _outcomes(self, ref: str) -> Outcomes:
    """Scores a version once."""
    tree = self.repo.show(ref).tree
    if tree not in self._known:
      self._known[tree] = self.suite.run(
        self.repo.checkout(ref), subject=tree, progress=True
      )
    return self._known[tree]

  def _gate(
    self,
    old: str,
    new: str,
    *,
    claims: tuple[str, ...] = (),
    policy: Policy | None = None,
  ) -> Verdict:
    """Compares two versions, shows the verdict and stores it with the new."""
    verdict = gate(
      self._outcomes(old),
      self._outcomes(new),
      self.suite,
      policy or evidence.contribution_policy(self.config),
      claims=claims,
      used=uses(self.repo, self.suite),
    )
    record(self.repo, new, verdict)
    self.echo(f"{new} against {old}\n{verdict}")
    return verdict

  def _line_of(
    self,
    branch: str,
    author: str,
    kind: str,
    verdict: Verdict,
    *,
    version: str | None = None,
    failed: bool = False,
  ) -> None:
    outcome = "refused" if failed else verdict.outcome
    if outcome != "accepted":
      self.rejected.append(branch)
    nbytes = self.facts.get(f"{branch}, bytes")
    if nbytes is None:
      # A merge: what its difference to the release takes as a patch.
      both = [self.repo.checkout(ref) for ref in ("v1.0.0", branch)]
      nbytes = pj.compress(pj.diff(*both)).nbytes
    self._line(
      version or branch,
      author,
      kind,
      nbytes,
      self._outcomes(branch),
      "released" if version else outcome,
    )

  def _line(
    self,
    version: str,
    author: str,
    kind: str,
    nbytes: int | None,
    outcomes: Any,
    verdict: str,
  ) -> None:
    scores = outcomes.values if isinstance(outcomes, Outcomes) else outcomes
    self.lines.append(
      report.Line(
        version=version,
        author=author,
        kind=kind,
        nbytes=nbytes,
        scores=scores,
        verdict=verdict,
      )
    )
