"""The whole API on one page, on a small network and a temporary repository.

Run it: `python tests/api_page.py`. Every line does what it says on real
numbers, and what it claims is asserted. Lines that are not built yet are
named at the end, each with its reason.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import patchjax as pj

NOT_BUILT = {
  "pj.lift(patch)": "the factored application of low-rank patches to layers "
  "belongs with the adapters' release; pj.apply materialises W + BA until then",
  "pj.release beyond PATCH evidence": "install, ranges, locks and forks come "
  "with packages; MINOR and MAJOR are classified by structure already",
}


# A model is a value: a pytree of named arrays.
def init(seed):
  rng = np.random.default_rng(seed)
  return {
    name: {
      "kernel": rng.standard_normal(shape).astype("f4") / shape[0] ** 0.5,
      "bias": np.zeros(shape[1], "f4"),
    }
    for name, shape in {"query": (8, 16), "value": (16, 4)}.items()
  }


def model(params, x):
  hidden = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
  return hidden @ params["value"]["kernel"] + params["value"]["bias"]


def log_prob(params, x):
  return jax.nn.log_softmax(model(params, x))


def cross_entropy(params, batch):
  x, y = batch
  return -jnp.mean(jnp.take_along_axis(log_prob(params, x), y[:, None], 1))


rng = np.random.default_rng(0)
inputs = rng.standard_normal((256, 8)).astype("f4")
base = init(1)
labels = np.asarray(jnp.argmax(model(base, inputs), 1))
labels = np.where(rng.random(256) < 0.2, (labels + 1) % 4, labels)
batch = (inputs, labels)


optimizer = optax.adam(3e-2)


@jax.jit
def step(patch, values, state):
  _, rebuild = pj.trainable(patch)

  def loss(v):
    return cross_entropy(pj.apply(base, rebuild(v)), batch)

  updates, state = optimizer.update(jax.grad(loss)(values), state)
  return optax.apply_updates(values, updates), state


def fit(patch, steps=30):
  """Trains a patch; the base is never differentiated."""
  values, rebuild = pj.trainable(patch)
  state = optimizer.init(values)  # of the patch's size
  for _ in range(steps):
    values, state = step(patch, values, state)
  return rebuild(values)


workdir = tempfile.TemporaryDirectory()
folder = pathlib.Path(workdir.name)

# Patches: diff, compress, apply, save.
zero = pj.diff(base, base)  # law add, dense
tuned = pj.apply(base, fit(zero))
patch = pj.diff(base, tuned)
exact = pj.diff(base, tuned, exact=True)  # law bits
kernels = pj.diff(base, tuned, only=r".*kernel")
assert kernels.names == ("query/kernel", "value/kernel")
found = pj.apply(base, exact)
assert pj.trees.tree_id(found) == pj.trees.tree_id(tuned)  # bit for bit
assert pj.trees.tree_id(pj.revert(found, exact)) == pj.trees.tree_id(base)

compeft = pj.chain(pj.trim(density=0.2), pj.ternarize())
small = pj.compress(patch, compeft, code="auto")
assert small.nbytes < patch.nbytes / 4
low_rank = pj.compress(kernels, pj.truncate(rank=4))
four_bits = pj.compress(patch, pj.quantize(bits=4))
params = jax.jit(pj.apply)(base, small)
params = pj.apply(jax.tree.map(jnp.array, base), small, donate=True)
half, half_tuned = (
  jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in (base, tuned)
)
wide = pj.apply(half, pj.diff(half, half_tuned), dtype=jnp.float32)
assert wide["query"]["kernel"].dtype == jnp.float32

small.save(folder / "fix.safetensors", base=base)
small = pj.Patch.load(folder / "fix.safetensors")
pj.check_base(base, small)

# Algebra: on one base, patches are a vector space.
both = pj.compose(patch, pj.diff(tuned, init(2)))
half_way = 0.5 * (patch + kernels)
assert 0 < pj.norm(half_way) < 2 * pj.norm(patch)

# Merging: a method is a chain of transforms, its numbers are traced.
others = [pj.apply(base, fit(zero, steps=n)) for n in (10, 20)]
method = pj.merging.ties(density=0.2, scale=1.0)
spelled = pj.chain(
  pj.trim(density=0.2, one_more=True),  # as the paper's code counts
  pj.merging.elect_sign(),
  pj.merging.disjoint_mean(),
  pj.scale(1.0),
)
merged = pj.merge(base, [tuned, *others], method)
again = jax.jit(pj.merge)(base, [tuned, *others], spelled)
assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, merged, again)))
mixed = pj.merge(
  base, [patch, others[0]], pj.merging.task_arithmetic(scale=0.4)
)
average = pj.merge(base, [tuned, *others], pj.merging.linear())
grams = [pj.statistics.gram(model, p, inputs) for p in (tuned, *others)]
fitted = pj.merge(None, [tuned, *others], pj.merging.regmean(grams=grams))
assert jax.tree.structure(fitted) == jax.tree.structure(base)
weights = jnp.array([0.5, 0.3, 0.2])
learned = jax.grad(
  lambda w: cross_entropy(
    pj.merge(base, [tuned, *others], pj.merging.linear(weights=w)), batch
  )
)(weights)  # coefficients can be learned
assert learned.shape == (3,)
report = pj.merging.conflicts(
  base, [patch, others[0]], probes=inputs, apply_fn=model
)
print(report)

# Tuning: patches to train.
lora = pj.tuning.lora(
  jax.random.key(0), base, rank=2, only=r".*(query|value)/kernel"
)
fish = pj.tuning.fish(
  log_prob, base, inputs, density=0.05, key=jax.random.key(1)
)
mask = pj.tuning.random_mask(base, density=0.05, key=jax.random.key(2))
before = cross_entropy(base, batch)
for zero_patch in (lora, fish, mask):
  assert cross_entropy(pj.apply(base, fit(zero_patch)), batch) < before
many = pj.stack([fit(fish, 5), fit(fish, 10)])
logits = jax.vmap(lambda p: model(pj.apply(base, p), inputs))(many)
assert logits.shape == (2, 256, 4)

# History: versions of a value.
repo = pj.Repo.init(folder / "clamp")
v1 = repo.commit(base, message="pretrained")
repo.tag("start", v1)
repo.branch("ducksville")
repo.branch("fidmor")
repo.commit(small, message="twenty percent, ternary", branch="ducksville")
repo.commit(others[0], message="trained in parallel", branch="fidmor")
repo.merge("main", ["ducksville", "fidmor"], method=method)
abstract = jax.eval_shape(lambda: base)
part = repo.checkout("main", like=abstract, only=r"query/.*")
whole = repo.checkout("main", like=base)
by_hand = pj.merge(base, [repo.checkout("ducksville"), others[0]], method)
assert pj.trees.tree_id(whole) == pj.trees.tree_id(by_hand)
for commit in repo.log():
  print(commit.id[:12], commit.message)
print(repo.diff("start", "main"))
assert repo.merge_base("ducksville", "fidmor") == v1
with repo.commit_async(tuned, message="in the background", branch="fidmor"):
  pass  # what is done here overlaps with the writing
lazy = repo.open("main")["query/kernel"]
assert lazy.shape == (8, 16)
assert np.array_equal(lazy[2:4], whole["query"]["kernel"][2:4])
assert repo.blame("main", only="query/.*")
repo.revert("fidmor", branch="fidmor")
repo.push(folder / "copy.git")
theirs = pj.Repo.clone(folder / "copy.git", folder / "theirs")
assert theirs.resolve("main") == repo.resolve("main")
assert repo.repack() is not None
assert repo.gc(dry_run=True) is not None
assert repo.fsck().ok
repo.export("main", folder / "plain_orbax")


# Vetting and releases: a version is earned.
def right(params):
  return np.asarray(jnp.argmax(model(params, inputs), 1) == labels, float)


suite = pj.vetting.Suite(
  "toy",
  "1.0.0",
  [pj.vetting.Test("labels", right, slices={"class 0": labels == 0})],
)
policy = pj.vetting.Policy(margin=0.05, slice_margin=0.2, flips=None)
first = pj.release(repo, "start", suite=suite, policy=policy)
verdict = pj.vetting.gate(
  repo.checkout("start"), repo.checkout("main"), suite, policy
)
print(verdict)
if verdict.accepted:
  second = pj.release(repo, "main", suite=suite, policy=policy)
  print(second)
  assert second.tag == "v1.0.1" and "v1.0.1" in repo.tags()
  params = repo.checkout("v1.0.1", like=abstract)

workdir.cleanup()
print("\nNot built yet:")
for line, reason in NOT_BUILT.items():
  print(f"  {line}: {reason}")
