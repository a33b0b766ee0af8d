"""Sparse task vectors in plain numpy: TIES, DARE, DELLA, Breadcrumbs.

Flavour "paper" follows the papers' own code: prateeky2806/ties-merging
(`ties_minimal.ipynb`), yule-BUAA/MergeLM (`mask_weights_utils.py`,
`merging_methods.py`), declare-lab/della (`sparsify.py`,
`generalized_task_arithmetic.py`) and rezazzr/breadcrumbs (`task_vectors.py`),
all read for defaults, counts and ties; written anew. Flavour "mergekit" is
checked against outputs of mergekit 0.1.5 in tests/golden.

Random methods are given their draws: `masks[i][name]`, True where an entry
stays, None where nothing was drawn (density >= 1).
"""

import numpy as np

from tests.reference import merging_common as common


def rescaled(delta, kept):
  """mergekit's `rescale`: kept, as long in the L1 norm as delta was."""
  before, after = np.abs(delta).sum(), np.abs(kept).sum()
  if before < 1e-7 or after < 1e-7:
    return kept
  return kept * (before / after)


def mixed(base, deltas, weights, *, elect, normalize, scale):
  """base + scale * sum of w_i d_i, of those of the elected sign if `elect`.

  Weights multiply before the election. Over the sum of the weights that took
  part if `normalize`; a sum of 0 (1e-8 without an election) counts as 1.
  """
  out = {}
  for name in base:
    terms = [w * d[name] for w, d in zip(weights, deltas)]
    if elect:
      agree = common.consensus(terms)
      sums = sum(term * a for term, a in zip(terms, agree))
      mass = sum(w * a for w, a in zip(weights, agree))
      mass = np.where(mass == 0, 1.0, mass)
    else:
      sums, mass = sum(terms), weights.sum()
      mass = 1.0 if abs(mass) < 1e-8 else mass
    out[name] = sums / mass if normalize else sums
  return common.added(base, out, scale)


def _paper_ties(base, deltas, densities, weights, scale, normalize):
  """TIES of task vectors over the whole flattened model."""
  vectors = []
  for delta, density in zip(deltas, densities):
    vector = common.flat(delta)
    k = len(vector) - int(len(vector) * density)
    if k > 0:  # kthvalue counts from one, so k = 0 keeps everything
      threshold = np.sort(np.abs(vector))[k - 1]
      vector = np.where(np.abs(vector) >= threshold, vector, 0.0)
    vectors.append(vector)
  sign = np.sign(common.total(vectors))
  sign = np.where(sign == 0, np.sign(sign.sum()), sign)
  # A sign that is still 0 selects the negative entries, as in the notebook.
  kept = [np.where(sign > 0, v * (v > 0), v * (v < 0)) for v in vectors]
  sums = sum(w * v for w, v in zip(weights, kept))
  if normalize:
    mass = sum(w * (v != 0) for w, v in zip(weights, kept))
    sums = sums / np.where(mass != 0, mass, 1.0)
  return common.added(base, common.unflat(sums, base), scale)


def ties(
  base,
  models,
  *,
  density=0.2,
  weights=None,
  scale=1.0,
  normalize=True,
  rescale=False,
  masks=None,
  flavour="paper",
):
  """Trim, elect signs, mean of what agrees.

  Yadav et al. 2023, https://arxiv.org/abs/2306.01708, section 3.2. Paper: the
  trim is over the whole model and keeps what is at least the (n - k)-th
  smallest magnitude (k + 1 entries), a sum of 0 takes the majority sign;
  weights (not in the paper) weigh the mean only. mergekit: max(1, int(density
  n)) entries a leaf (which of equal ones is not defined there, torch's sort is
  not stable; here the first); weights before the election.
  """
  del masks
  common.check(flavour)
  k = len(models)
  w, densities = common.numbers(weights, k), common.numbers(density, k)
  deltas = common.task_vectors(base, models)
  if flavour == "paper":
    return _paper_ties(base, deltas, densities, w, scale, normalize)
  for delta, share in zip(deltas, densities):
    for name, x in delta.items():
      if share >= 1:
        continue
      count = max(1, int(share * x.size)) if share > 0 else 0
      order = np.argsort(-np.abs(x), axis=None, kind="stable")[:count]
      kept = np.zeros_like(x)
      kept.flat[order] = x.flat[order]
      delta[name] = rescaled(x, kept) if rescale else kept
  return mixed(base, deltas, w, elect=True, normalize=normalize, scale=scale)


def _dropped(base, models, density, masks, rescale, flavour):
  """Task vectors after DARE: /density in the paper, L1 kept in mergekit."""
  out = common.task_vectors(base, models)
  densities = common.numbers(density, len(models))
  for delta, share, mask in zip(out, densities, masks):
    for name, x in delta.items():
      if mask[name] is None:
        continue
      kept = x * mask[name]
      if rescale and flavour == "mergekit":
        kept = rescaled(x, kept)
      elif rescale and share > 0:
        kept = kept / share
      delta[name] = kept
  return out


def dare_linear(
  base,
  models,
  *,
  density=0.5,
  weights=None,
  scale=1.0,
  normalize=False,
  rescale=True,
  masks,
  flavour="paper",
):
  """Task arithmetic of task vectors of which a share stays, at random.

  Yu et al. 2024, https://arxiv.org/abs/2311.03099: drop with
  p = 1 - density, divide by 1 - p.
  """
  common.check(flavour)
  deltas = _dropped(base, models, density, masks, rescale, flavour)
  w = common.numbers(weights, len(models))
  return mixed(base, deltas, w, elect=False, normalize=normalize, scale=scale)


def dare_ties(
  base,
  models,
  *,
  density=0.5,
  trim=0.2,
  weights=None,
  scale=1.0,
  normalize=None,
  rescale=True,
  masks,
  flavour="paper",
):
  """DARE, then TIES.

  MergeLM's `mask_merging` with `ties_merging` runs all of TIES on the dropped
  vectors, which keeps its share `trim` of the whole model (mask rate 0.8; it
  rounds n * 0.8 down where TIES rounds n * 0.2 down: one entry at most, and
  TIES's way is taken here).
  mergekit elects signs only: no trim, no division unless `normalize`.
  """
  common.check(flavour)
  deltas = _dropped(base, models, density, masks, rescale, flavour)
  w = common.numbers(weights, len(models))
  paper = flavour == "paper"
  normalize = paper if normalize is None else normalize
  if paper:
    trims = common.numbers(trim, len(models))
    return _paper_ties(base, deltas, trims, w, scale, normalize)
  return mixed(base, deltas, w, elect=True, normalize=normalize, scale=scale)


def della_probabilities(delta, density, epsilon, *, flavour="paper"):
  """MagPrune's keep probability of each entry of one leaf.

  p = density - epsilon + 2 epsilon (r - 1) / (n - 1) with r the rank of the
  magnitude in its row of n entries, of equal ones the first is the lower. A
  row is the last axis (mergekit: axis 1); a vector is one row. A row of one
  entry, 0/0 in both codes, is given p = density here.
  """
  x = np.abs(np.atleast_2d(delta))
  axis = 1 if flavour == "mergekit" else -1
  order = np.argsort(x, axis=axis, kind="stable")
  ranks = np.argsort(order, axis=axis, kind="stable")
  n = x.shape[axis]
  share = ranks / (n - 1) if n > 1 else np.full(x.shape, 0.5)
  return (density - epsilon + 2 * epsilon * share).reshape(np.shape(delta))


def della_kept(drawn, delta, density, epsilon, *, axis=-1):
  """A mask with MagPrune's probabilities, of a uniform number an entry.

  Below density - epsilon it is kept. Between that and density + epsilon the
  place of the number in between says with which of the other entries of the
  row it is compared: the smaller one goes, of equal ones the first.
  """
  axis = axis if np.ndim(delta) > 1 else -1
  x, u = (np.moveaxis(np.atleast_1d(y), axis, -1) for y in (delta, drawn))
  x = np.abs(x)
  n = x.shape[-1]
  density, epsilon = np.float32(density), np.float32(epsilon if n > 1 else 0)
  low, high = density - epsilon, density + epsilon
  column = np.arange(n)
  width = high - low if high > low else np.float32(1)
  other = ((u - low) * (np.float32(n - 1) / width)).clip(0, max(n - 2, 0))
  other = other.astype(np.int64)
  other = np.minimum(other + (other >= column), n - 1)
  found = np.take_along_axis(x, other, -1)
  larger = (x > found) | ((x == found) & (other < column))
  mask = (u < low) | ((u < high) & larger)
  return np.moveaxis(mask, -1, axis).reshape(np.shape(delta))


def della(
  base,
  models,
  *,
  density=0.5,
  epsilon=0.15,
  weights=None,
  scale=1.0,
  normalize=True,
  rescale=True,
  elect=True,
  masks,
  flavour="paper",
):
  """MagPrune: larger entries stay likelier; then sign election and mean.

  Deep et al. 2024, https://arxiv.org/abs/2406.11617. Paper: what stays is
  divided by its own probability (epsilon is half of its code's window_size).
  mergekit: by one number a leaf, so that the L1 norm stays.
  """
  common.check(flavour)
  k = len(models)
  deltas = common.task_vectors(base, models)
  densities, epsilons = common.numbers(density, k), common.numbers(epsilon, k)
  for delta, share, eps, mask in zip(deltas, densities, epsilons, masks):
    for name, x in delta.items():
      if mask[name] is None:
        continue
      kept = x * mask[name]
      if rescale and flavour == "mergekit":
        kept = rescaled(x, kept)
      elif rescale:
        kept = kept / della_probabilities(x, share, eps)
      delta[name] = kept
  w = common.numbers(weights, k)
  return mixed(base, deltas, w, elect=elect, normalize=normalize, scale=scale)


def della_linear(base, models, *, normalize=False, **options):
  """DELLA without the election. The paper's code has it as an ablation."""
  return della(base, models, normalize=normalize, elect=False, **options)


def _middle(row, density, gamma):
  """A row without its largest int(gamma n), then its int(density n) largest."""
  n = row.size
  order = np.argsort(-np.abs(row), kind="stable")
  top, count = int(gamma * n), int(density * n)
  kept = np.zeros_like(row)
  chosen = order[top : top + count]
  kept[chosen] = row[chosen]
  return kept


def _middle_mergekit(x, density, gamma):
  """Of a whole leaf; fewer large entries go if too few would stay."""
  count, top = int(density * x.size), int(gamma * x.size)
  bottom = max(0, x.size - count - top)
  order = np.argsort(np.abs(x), axis=None, kind="stable")
  kept = np.zeros_like(x)
  chosen = order[bottom : bottom + count]
  kept.flat[chosen] = x.flat[chosen]
  return kept


def breadcrumbs(
  base,
  models,
  *,
  density=0.1,
  gamma=0.01,
  scope=None,
  weights=None,
  scale=1.0,
  normalize=False,
  rescale=False,
  elect=False,
  masks=None,
  flavour="paper",
):
  """Task arithmetic of task vectors without the largest and smallest entries.

  Davari and Belilovsky 2024, https://arxiv.org/abs/2312.06795. The paper
  speaks of the weights of a layer; its code counts along the last axis, row by
  row (`scope="row"`, the default; a scalar stays), gamma of the largest first.
  mergekit counts over the leaf, and a density of at least 1 keeps all.
  """
  del masks
  common.check(flavour)
  k = len(models)
  deltas = common.task_vectors(base, models)
  densities, gammas = common.numbers(density, k), common.numbers(gamma, k)
  for delta, share, top in zip(deltas, densities, gammas):
    for name, x in delta.items():
      if flavour == "mergekit":
        if share < 1:
          kept = _middle_mergekit(x, share, top)
          delta[name] = rescaled(x, kept) if rescale else kept
      elif x.ndim:
        rows = x.reshape(-1, x.size if scope == "leaf" else x.shape[-1])
        kept = [_middle(row, share, top) for row in rows]
        delta[name] = np.stack(kept).reshape(x.shape)
  w = common.numbers(weights, k)
  return mixed(base, deltas, w, elect=elect, normalize=normalize, scale=scale)


def breadcrumbs_ties(base, models, **options):
  """Breadcrumbs with the sign election; mergekit's, no paper."""
  return breadcrumbs(base, models, elect=True, **options)
