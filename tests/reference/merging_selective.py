"""Methods that choose entries across contributors, in plain numpy.

SCE, RAM, NearSwap, Arcee Fusion: flavour "mergekit" is checked against outputs
of mergekit 0.1.5. Flavour "paper" and the others follow the authors' code,
read for defaults and ties, written anew: FuseAI's `sce_merging.py` (in
18907305772/FuseAI), xiangchi-yuan/mrl `ram-main.py`, danielm1405/magmax
`task_vectors.py`, nik-dim/tall_masks `tallmask_utils.py` and `aggregation.py`,
harveyhuang18/EMR_Merging `main_emr_merging.py`, duguodong7/pcb-merging
`pcb-merging.py`.
"""

import numpy as np

from tests.reference import merging_common as common


def sce(base, models, *, density=1.0, masks=None, flavour="paper"):
  """Select by variance, calculate weights by energy, erase minority signs.

  Wan et al. 2024, https://arxiv.org/abs/2408.07990 (SCE). A leaf
  keeps the int(density nnz) entries of the largest variance over contributors.
  In FuseChat's code these only shape the weights mean(tau_i^2), and all
  entries are elected and averaged; mergekit leaves the others at the base.
  Weights are equal if all energies are 0 (mergekit: if they sum to less than
  1e-6), and mergekit divides by at least 1e-6.
  """
  del masks
  common.check(flavour)
  mergekit = flavour == "mergekit"
  deltas = common.task_vectors(base, models)
  out = {}
  for name in base:
    x = np.stack([d[name] for d in deltas])
    selected = x
    if density < 1:
      # Population variance of the float32 task vectors.
      variance = np.var(x, axis=0)
      count = int(np.count_nonzero(variance) * density)
      order = np.argsort(-variance, axis=None, kind="stable")[:count]
      chosen = np.zeros(variance.shape)
      chosen.flat[order] = 1
      selected = x * chosen
    if mergekit:
      x = selected
    energy = np.mean(selected.reshape(len(x), -1) ** 2, axis=1)
    if energy.sum() < 1e-6 if mergekit else energy.sum() == 0:
      energy = np.ones(len(x))
    share = energy / energy.sum()
    agree = common.consensus(list(x))
    sums = sum(s * t * a for s, t, a in zip(share, x, agree))
    mass = sum(s * a for s, a in zip(share, agree))
    mass = np.maximum(mass, 1e-6) if mergekit else np.where(mass, mass, 1.0)
    out[name] = sums / mass
  return common.added(base, out)


def _active(base, models, threshold):
  """Task vectors, which entries moved, and by how many contributors."""
  deltas = common.task_vectors(base, models)
  moved = [{n: np.abs(d[n]) > threshold for n in base} for d in deltas]
  count = {n: sum(m[n].astype(int) for m in moved) for n in base}
  return deltas, moved, count


def _ram(base, models, threshold, boosts):
  """RAM with a factor a contributor (for each leaf) on entries of its own."""
  deltas, moved, count = _active(base, models, threshold)
  out = {}
  for name in base:
    out[name] = 0.0
    for delta, m, boost in zip(deltas, moved, boosts(moved, count, name)):
      alone = np.where(count[name] == 1, boost, 1.0)
      out[name] += delta[name] * m[name] * alone / np.maximum(count[name], 1)
  return common.added(base, out)


def ram(base, models, *, threshold=1e-5, masks=None, flavour="paper"):
  """Each entry is the mean over the contributors that moved it.

  https://arxiv.org/abs/2601.13572; moved is |tau| > threshold. mergekit agrees
  with the authors' code.
  """
  del masks
  common.check(flavour)
  return _ram(base, models, threshold, lambda *_: [1.0] * len(models))


def ramplus(
  base,
  models,
  *,
  r=0.1,
  alpha=None,
  threshold=1e-5,
  masks=None,
  flavour="paper",
):
  """RAM, with entries of one contributor times 1 + r clip(rho, 0, alpha).

  https://arxiv.org/abs/2601.13572. rho is the contributor's number of shared
  moved entries over that of its own, of the model in the authors' code (there
  alpha is 1, r is rescale_factor - 1: 0.2 in its README, 0.1 and 0.05 in its
  defaults, and nothing of one's own is a division by zero, here clipped), of
  the leaf in mergekit (`ramplus_tl`, alpha 0.2, division by at least 1e-5,
  which is `epsilon`, its threshold too). The paper's text was not seen.
  """
  del masks
  common.check(flavour)
  mergekit = flavour == "mergekit"
  alpha = (0.2 if mergekit else 1.0) if alpha is None else alpha

  def boosts(moved, count, name):
    names = [name] if mergekit else list(base)
    out = []
    for m in moved:
      shared = sum(np.sum(m[n] & (count[n] > 1)) for n in names)
      own = sum(np.sum(m[n] & (count[n] == 1)) for n in names)
      rho = shared / max(own, threshold if mergekit else 1e-30)
      out.append(1 + r * np.clip(rho, 0, alpha))
    return out

  return _ram(base, models, threshold, boosts)


def nearswap(base, models, *, t, masks=None, flavour="paper"):
  """Moves every entry of the base towards the contributor's, by t at most.

  That is linear interpolation with weight min(1, t / |x_0 - x_1|).

  https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001 (the card's own
  code could not be seen). mergekit floors the difference at 1e-6.
  """
  del masks
  common.check(flavour)
  (model,) = map(common.wide, models)
  floor = 1e-6 if flavour == "mergekit" else 0.0
  out = {}
  for name, a in common.wide(base).items():
    distance = np.maximum(np.abs(a - model[name]), floor)
    safe = np.where(distance > 0, distance, 1.0)
    weight = np.where(distance > 0, np.clip(t / safe, 0, 1), 1.0)
    out[name] = weight * model[name] + (1 - weight) * a
  return out


def arcee_importance(base, model):
  """|x - base| times the row's KL(softmax(x) || softmax(base)) of one leaf.

  Rows are the last axis; both softmaxes get 1e-8 added, not renormalised.
  """

  def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) + 1e-8

  a, b = np.asarray(base, np.float64), np.asarray(model, np.float64)
  p, q = softmax(b), softmax(a)
  divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
  return np.abs(b - a) * divergence


def arcee_fusion(base, models, *, masks=None, flavour="paper"):
  """Takes the contributor's entries whose importance is an outlier.

  No paper; mergekit is the source. Threshold median + 1.5 (q3 - q1) of
  `arcee_importance`, where quantile q is the int(q (n - 1))-th smallest, from
  0. mergekit samples leaves of more than a million entries; not here.
  """
  del masks
  common.check(flavour)
  (model,) = models
  out = {}
  for name, a in common.wide(base).items():
    score = arcee_importance(a, model[name])
    ordered = np.sort(score, axis=None)
    q1, median, q3 = (
      ordered[int(q * (score.size - 1))] for q in (0.25, 0.5, 0.75)
    )
    out[name] = np.where(
      score >= median + 1.5 * (q3 - q1), np.asarray(model[name], np.float64), a
    )
  return out


def magmax(base, models, *, scale=0.5, masks=None, flavour="paper"):
  """The entry of the largest magnitude; of equal ones the last contributor's.

  Marczak et al. 2024, https://arxiv.org/abs/2407.06322; 0.5 in its scripts.
  """
  del masks
  common.check(flavour)
  best, *rest = common.task_vectors(base, models)
  for d in rest:
    best = {
      n: np.where(np.abs(d[n]) >= np.abs(best[n]), d[n], best[n]) for n in d
    }
  return common.added(base, best, scale)


def tall_masks(base, models, *, threshold=0.4):
  """For each contributor the entries it needs of the sum of task vectors.

  Wang et al. 2024, https://arxiv.org/abs/2405.07813:
  |tau_t| > threshold |sum tau - tau_t|. Strictly, in its code (the formula is
  often quoted with >=); 0.2 to 0.6 are tried there for each task, by
  accuracy.
  """
  deltas = common.task_vectors(base, models)
  ratio = common.numbers(threshold, len(models))
  joint = {n: sum(d[n] for d in deltas) for n in base}
  return [
    {n: np.abs(d[n]) > r * np.abs(joint[n] - d[n]) for n in base}
    for r, d in zip(ratio, deltas)
  ]


def consensus_ta(
  base,
  models,
  *,
  threshold=0.4,
  agreement=2,
  scale=1.0,
  masks=None,
  flavour="paper",
):
  """Sum of task vectors, without entries that fewer than two tasks need.

  https://arxiv.org/abs/2405.07813; `prun_thre_k` is 2 in its code,
  and scale is searched.
  """
  del masks
  common.check(flavour)
  needed = tall_masks(base, models, threshold=threshold)
  deltas = common.task_vectors(base, models)
  out = {
    n: sum(d[n] for d in deltas) * (sum(m[n] for m in needed) >= agreement)
    for n in base
  }
  return common.added(base, out, scale)


def emr_unified(base, models):
  """EMR's unified task vector, and each contributor's mask.

  Sign of the mean (0 counts as negative), the largest magnitude among the
  contributors of that sign.
  """
  deltas = common.task_vectors(base, models)
  unified, agree = {}, [{} for _ in models]
  for name in base:
    sign = np.where(common.total([d[name] for d in deltas]) > 0, 1.0, -1.0)
    for mask, d in zip(agree, deltas):
      mask[name] = d[name] * sign > 0
    largest = np.max(
      [np.abs(d[name]) * m[name] for d, m in zip(deltas, agree)], axis=0
    )
    unified[name] = sign * largest
  return unified, agree


def emr_rescalers(base, models):
  """Each contributor's number: sum of mean |tau| over sum of mean |masked|.

  Means a leaf, then a sum over leaves, as in the code; the paper's text
  was not seen; FusionBench follows the code.
  """
  unified, agree = emr_unified(base, models)
  deltas = common.task_vectors(base, models)
  return [
    sum(np.mean(np.abs(d[n])) for n in base)
    / sum(np.mean(np.abs(unified[n] * m[n])) for n in base)
    for d, m in zip(deltas, agree)
  ]


def emr(base, models, *, scale=1.0, masks=None, flavour="paper"):
  """base + unified task vector.

  Huang et al. 2024, https://arxiv.org/abs/2405.17461. A task's own model is
  base + rescaler * mask * unified.
  """
  del masks
  common.check(flavour)
  unified, _ = emr_unified(base, models)
  return common.added(base, unified, scale)


def _limits(values, low, high):
  """Clamps to the sorted entries int(n low) and int(n (1 - high) - 1)."""
  ordered, n = np.sort(values), len(values)
  return np.clip(
    values, ordered[int(n * low)], ordered[int(n * (1 - high) - 1)]
  )


def _unit(values):
  """Moved and scaled to [0, 1]."""
  low, high = values.min(), values.max()
  return (values - low) / (high - low)


def pcb(base, models, *, density=0.1, scale=1.0, masks=None, flavour="paper"):
  """Parameter competition balancing over the whole flattened model.

  Du et al. 2024, https://arxiv.org/abs/2410.02396. Score: exp(k unit(|tau|)^2)
  times tanh(tau_i sum tau); scores under the int(n (1 - density))-th smallest
  count as that one; moved and scaled to [0, 1] they weigh the mean of task
  vectors whose magnitudes were clamped to the middle 99.98 %. Ratio 0.1 in the
  function, 0.05 in the script, where scale is searched from 1.2.
  """
  del masks
  common.check(flavour)
  vectors = [common.flat(d) for d in common.task_vectors(base, models)]
  joint = sum(vectors)
  sums, mass = 0.0, 0.0
  for v in vectors:
    size = _limits(np.abs(v), 1e-4, 1e-4)
    score = np.exp(len(vectors) * _unit(size) ** 2) * np.tanh(v * joint)
    weight = _unit(_limits(score, 1 - density, 0.0))
    sums = sums + weight * np.sign(v) * size
    mass = mass + weight
  out = sums / np.maximum(mass, 1e-12)
  return common.added(base, common.unflat(out, base), scale)
