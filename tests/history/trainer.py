"""A training run as a process: `python -m tests.history.trainer ...`.

    run REPO STEPS          trains from the start, committing the last state
    resume REPO STEPS       restores the tip in this process, and goes on
    loop REPO STEPS EVERY   trains through the hook, from where it was left
    pair REPO PORT PROCESS  saves and restores as one of two processes

Prints the digest of the state it ends with.
"""

import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import patchjax as pj
from patchjax.history import Record, Repo
from patchjax.history.arrays.state import arrays
from patchjax.history.storage.refs import TAGS
from patchjax.trees.errors import RepositoryError


def begin(folder, *arguments):
  """Starts a training process; programs compiled once are kept in a folder."""
  return subprocess.Popen(
    [sys.executable, "-m", "tests.history.trainer", *map(str, arguments)],
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env={
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
  )


def process(folder, *arguments):
  """Returns the lines that a training process prints."""
  running = begin(folder, *arguments)
  printed, _ = running.communicate()
  assert running.returncode == 0
  return printed.splitlines()


class Shuffled:
  """A shuffled data iterator whose position is JSON, as grain's is."""

  def __init__(self, size=32):
    self.size, self.epoch, self.at = size, 0, 0

  def __next__(self):
    if self.at == self.size:
      self.epoch, self.at = self.epoch + 1, 0
    order = np.random.default_rng(self.epoch).permutation(self.size)
    batch = order[self.at : self.at + 8]
    self.at += 8
    return np.float32(batch)[:, None] * np.linspace(0, 1, 8, dtype=np.float32)

  def get_state(self):
    # Its length varies: what restores it must not ask for the same size.
    return {"epoch": self.epoch, "at": self.at, "seen": list(range(self.at))}

  def set_state(self, state):
    self.epoch, self.at = state["epoch"], state["at"]


OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.masked(
    optax.inject_hyperparams(optax.adamw)(
      optax.linear_schedule(1e-2, 0.0, 50), weight_decay=0.1
    ),
    {"hidden": {"bias": False, "kernel": True}, "out": True},
  ),
)


def start():
  """The state of a run that has not begun, over a mesh where there is one."""
  mesh = jax.make_mesh((jax.device_count(),), ("x",))
  spread = jax.NamedSharding(mesh, jax.P("x"))
  whole = jax.NamedSharding(mesh, jax.P())
  keys = jax.random.split(jax.random.key(0), 2)
  params = {
    "hidden": {
      "kernel": jax.device_put(jax.random.normal(keys[0], (8, 16)), spread),
      "bias": jax.device_put(jnp.zeros(16, jnp.bfloat16), whole),
    },
    "out": jax.device_put(jax.random.normal(keys[1], (16,)), whole),
  }
  return {
    "params": params,
    "opt": OPTIMIZER.init(params),
    "dropout": jax.random.key(7, impl="rbg"),
    "raw": jax.random.PRNGKey(3),
    "scale": jnp.asarray(0.5),  # of weak type
    "step": 0,
    "data": Record(Shuffled().get_state()),
  }


@jax.jit
def update(params, opt, key, raw, scale, batch):
  key, now = jax.random.split(key)
  raw, noise = jax.random.split(raw)

  def loss(p):
    x = batch @ p["hidden"]["kernel"]
    x = x + p["hidden"]["bias"].astype(jnp.float32)[None]
    x = jax.nn.relu(x) * jax.random.bernoulli(now, 0.8, (8, 16))
    x = (x * (scale * p["hidden"]["bias"] + 1).astype(jnp.float32)[None]).sum(0)
    return jnp.mean((x * p["out"] + jax.random.normal(noise, (16,))) ** 2)

  value, grads = jax.value_and_grad(loss)(params)
  updates, opt = OPTIMIZER.update(grads, opt, params)
  return optax.apply_updates(params, updates), opt, key, raw, value


def step(state, iterator):
  params, opt, key, raw, value = update(
    *(state[k] for k in ("params", "opt", "dropout", "raw", "scale")),
    next(iterator),
  )
  new = {
    "params": params,
    "opt": opt,
    "dropout": key,
    "raw": raw,
    "scale": state["scale"],
    "step": state["step"] + 1,
    "data": Record(iterator.get_state()),
  }
  return new, float(value)


def train(state, steps):
  iterator = Shuffled()
  iterator.set_state(state["data"].value)
  while state["step"] < steps:
    state, _ = step(state, iterator)
  return state


def digest(state):
  return pj.trees.tree_id(arrays(pj.trees.named_leaves(state)))


def loop(repo, steps, every):
  from patchjax.history.training import Checkpointer

  with Checkpointer(repo, every=every, keep_last=2) as saver:
    state = start()
    if saver.latest_step is not None:
      state = saver.restore(state)
    print("from", state["step"], flush=True)
    iterator = Shuffled()
    iterator.set_state(state["data"].value)
    while state["step"] < steps:
      state, value = step(state, iterator)
      saver.save(state["step"], state, metrics={"loss": value})
      print("step", state["step"], flush=True)
    return state


def pair(repo, process):
  """Saves a spread array by two processes; returns what one of them sees."""
  from patchjax.history.training import Checkpointer

  mesh = jax.make_mesh((4,), ("x",))
  where = jax.NamedSharding(mesh, jax.P("x"))
  seen = []
  for asynchronous in (True, False):
    with Checkpointer(
      repo, keep_last=2, keep_every=4, asynchronous=asynchronous, grace=0
    ) as saver:
      for number in range(1, 5) if asynchronous else range(5, 8):
        host = np.arange(8, dtype=np.float32) * number
        w = jax.make_array_from_callback((8,), where, host.__getitem__)
        saver.save(number, {"w": w, "step": number})
        if number == 3:
          # What goes wrong in the process that moves the refs, in both.
          saver.wait()
          if not process:
            repo.refs.move(
              TAGS, "steps/main/4/x", old=None, new=repo.resolve("main")
            )
          try:
            saver.save(4, {"w": w, "step": 4})
            saver.wait()
          except RepositoryError as error:
            seen.append(type(error).__name__)
          if not process:
            repo.refs.move(
              TAGS, "steps/main/4/x", old=repo.resolve("main"), new=None
            )
          saver.wait()
      back = saver.restore({"w": w, "step": 0})
      assert back["w"].sharding == where and back["step"] == number
      for shard in back["w"].addressable_shards:
        assert np.array_equal(shard.data, host[shard.index])
      saver.wait()
      seen.append(saver.all_steps)
  return seen


def main(verb, path, steps, every="1"):
  if verb == "pair":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
      f"localhost:{steps}", num_processes=2, process_id=int(every)
    )
    print(pair(Repo(path), int(every)), flush=True)
    jax.distributed.shutdown()
    return
  jax.config.update("jax_num_cpu_devices", 4)
  repo = Repo.init(path)
  if verb == "loop":
    state = loop(repo, int(steps), int(every))
  else:
    state = start()
    if verb == "resume":
      state = repo.checkout(like=state)
    state = train(state, int(steps))
    repo.commit(state, message=f"step {steps}")
  print(digest(state), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
