"""Settings every test runs under.

Eight CPU devices make sharding real; strict promotion and rank promotion
turn a silent bf16 + f32 or a silent broadcast into an error.
"""

import os

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
