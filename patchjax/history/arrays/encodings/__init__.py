"""Encodings: how the bits of a leaf are held in a payload, without loss.

A leaf is stored by itself (`dense`, `words`) or as a difference to a base of
the same dtype and shape (`planes`, `bits`, `sparse`, `factors`). An encoding
turns the words of a leaf into a few named arrays, and any region of the leaf
back from regions of those: a shard reads what it needs and no more. Which
encoding is smallest is not guessed: `choose` codes a sample of the leaf.

In a payload the arrays lie under the leaf's key (part ""), or `key//part`.
Factors lie in no payload: they are read from the patch file that brought them.
"""

from patchjax.history.arrays.encodings.choosing import (
  ENCODINGS,
  SMALLEST,
  choose,
  measure,
  smallest,
)
from patchjax.history.arrays.encodings.common import (
  Encoding,
  Fetch,
  aligned,
  fetch_from,
  key_of,
  parts_of,
  word_of,
  words_shape,
)
from patchjax.history.arrays.encodings.factors import (
  FACTORS,
  Factors,
  applied,
  factors_of,
  fetch_patch,
  is_made,
  object_of,
)
from patchjax.history.arrays.encodings.measuring import compressible
from patchjax.history.arrays.encodings.plain import (
  DENSE,
  WORDS,
  plain_encoding,
  to_stored,
)
from patchjax.history.arrays.encodings.planes import (
  PLANES,
  from_planes,
  to_planes,
)

MAX_DEPTH = 8
"""Longest chain of differences; the next one starts below it."""
