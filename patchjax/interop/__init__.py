"""Other people's formats and frameworks, imported only when they are used.

Everything in patchjax takes any pytree; these are the few lines that make
users of flax nnx and equinox feel at home, and the files they already have.
"""

from patchjax.interop import comparison, equinox, nnx
from patchjax.interop.exporting import export
from patchjax.interop.files import read, write
from patchjax.interop.importing import import_

__all__ = [
  "comparison",
  "equinox",
  "export",
  "import_",
  "nnx",
  "read",
  "write",
]
