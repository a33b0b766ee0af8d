"""Git for model weights: patches, histories, merges, gates and releases.

The flat names are the daily API; the subpackages hold the rest. Everything
is imported on first use, so `import patchjax` is cheap and starts no device.

Example:
  >>> import patchjax as pj
  >>> "apply" in dir(pj) and "merging" in dir(pj)
  True
"""

from typing import TYPE_CHECKING

from patchjax.trees.lazy import attach

if TYPE_CHECKING:
  from patchjax.history import Repo as Repo
  from patchjax.merging import merge as merge
  from patchjax.merging import scale as scale
  from patchjax.patches import Patch as Patch
  from patchjax.patches import Transform as Transform
  from patchjax.patches import apply as apply
  from patchjax.patches import chain as chain
  from patchjax.patches import check_base as check_base
  from patchjax.patches import compose as compose
  from patchjax.patches import compress as compress
  from patchjax.patches import diff as diff
  from patchjax.patches import from_spec as from_spec
  from patchjax.patches import norm as norm
  from patchjax.patches import quantize as quantize
  from patchjax.patches import revert as revert
  from patchjax.patches import stack as stack
  from patchjax.patches import ternarize as ternarize
  from patchjax.patches import trainable as trainable
  from patchjax.patches import trim as trim
  from patchjax.patches import truncate as truncate
  from patchjax.releases import release as release
  from patchjax.trees import PatchjaxError as PatchjaxError
  from patchjax.trees import check_compatible as check_compatible
  from patchjax.trees import rename as rename
  from patchjax.trees import select as select

__version__ = "0.1.0"

# Where each flat name lives, and the subpackages.
__getattr__, __dir__ = attach(
  __name__,
  {
    "trees": "PatchjaxError check_compatible rename select",
    "patches": (
      "Patch Transform apply chain check_base compose compress diff from_spec"
      " norm quantize revert stack ternarize trainable trim truncate"
    ),
    "merging": "merge scale",
    "history": "Repo",
    "releases": "release",
  },
  modules=(
    "trees",
    "patches",
    "statistics",
    "tuning",
    "merging",
    "history",
    "vetting",
    "releases",
    "interop",
    "views",
    "cli",
    "demo",
  ),
)
