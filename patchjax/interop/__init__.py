"""Other people's formats and frameworks, imported only when they are used.

Everything in patchjax takes any pytree; these are the few lines that make
users of flax nnx and equinox feel at home, and the files they already have.
"""

from patchjax.interop import comparison, equinox, files, nnx
from patchjax.interop.files import load_params, save_params

__all__ = [
  "comparison",
  "equinox",
  "files",
  "load_params",
  "nnx",
  "save_params",
]
