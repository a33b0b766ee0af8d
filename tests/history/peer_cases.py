"""Values and histories for the tests of what peers get wrong."""

import os

import numpy as np

import patchjax as pj

LARGE = (160, 160)  # more than a blob of 64 KiB holds


def noise(shape, seed=0, scale=1.0):
  """Normal float32 numbers."""
  rng = np.random.default_rng(seed)
  return np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)


def bits(value):
  """dtype, shape and bytes of every leaf."""
  return {
    name: (np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes())
    for name, x in pj.trees.named_leaves(value).items()
  }


def forked(repo, base, ours, theirs):
  """A base on main, and two versions of it: on main and on theirs."""
  repo.commit(base, message="base")
  repo.branch("theirs")
  repo.commit(ours, message="ours")
  repo.commit(theirs, message="theirs", branch="theirs")


def scattered(x, count, seed):
  """Numbers of which some moved."""
  rng = np.random.default_rng(seed)
  at = rng.choice(x.size, count, replace=False)
  y = x.reshape(-1).copy()
  y[at] += rng.standard_normal(count, dtype=np.float32)
  return y.reshape(x.shape)


def chained(repo, depth):
  """Commits a chain of sparse versions; returns the values."""
  values = [noise(LARGE)]
  for step in range(depth):
    values.append(scattered(values[-1], 200, step))
  for step, value in enumerate(values):
    repo.commit({"w": value}, message=f"step {step}")
  return values


def packs_of(repo, digest):
  """The payloads and blobs that a leaf is decoded from."""
  repo.index.refresh()
  found = []
  while digest is not None:
    place = repo.index.find([digest])[digest][0]
    found.append(place.pack)
    digest = place.base
  return found


def size(repo):
  """Bytes of a repository, without its cache."""
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(repo.path)
    for name in names
    if "cache" not in folder
  )
