"""Settings every test runs under.

Eight CPU devices make sharding real; strict promotion and rank promotion
turn a silent bf16 + f32 or a silent broadcast into an error.
"""

import gc
import os
import shutil
import tempfile

# Before jax starts: config, not XLA_FLAGS, so that a user's flags survive.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A process a core is enough: threads of OpenBLAS would wait by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time is tracing and compilation. A trace makes many objects that
# live on, which the collector would look through again and again; and for each
# operation it would note the lines that called it.
gc.set_threshold(200_000, 50, 50)
jax.config.update("jax_traceback_in_locations_limit", 0)

# The first call of a jitted function compiles: a deadline would time that.
hypothesis.settings.register_profile(
  "patchjax", deadline=None, max_examples=40, derandomize=True
)
hypothesis.settings.load_profile("patchjax")


@pytest.fixture
def mesh_explicit():
  """A 4 x 2 mesh as `jax.make_mesh` makes it: Explicit axes."""
  return jax.make_mesh((4, 2), ("x", "y"))


@pytest.fixture
def mesh_auto():
  """A 4 x 2 mesh with Auto axes."""
  kind = jax.sharding.AxisType.Auto
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


# Processes compile many programs alike: each is compiled once in a run. Those
# that tests start compile for themselves, as some of them are killed.


def pytest_configure(config):
  given = getattr(config, "workerinput", None)
  folder = given["compiled"] if given else tempfile.mkdtemp("-compiled")
  config.compiled = folder
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure_node(node):
  node.workerinput["compiled"] = node.config.compiled


def pytest_unconfigure(config):
  if not hasattr(config, "workerinput"):
    shutil.rmtree(config.compiled, ignore_errors=True)
