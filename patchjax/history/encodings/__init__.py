"""Encodings: how the bits of a leaf are held in a payload, without loss.

A leaf is stored by itself (`dense`, `words`) or as a difference to a base of
the same dtype and shape (`planes`). An encoding turns the words of a leaf into
a few named arrays, and any region of the leaf back from regions of those: a
shard reads what it needs and no more. Which encoding is smallest is not
guessed: `choose` compresses a sample with the codec that will store it.

In a payload the arrays lie under the leaf's key (part ""), or `key//part`.
"""

from patchjax.history.encodings.choosing import MAX_DEPTH, SMALLEST, choose
from patchjax.history.encodings.common import (
  Encoding,
  Fetch,
  fetch_from,
  key_of,
  parts_of,
  word_of,
  words_shape,
)
from patchjax.history.encodings.plain import (
  DENSE,
  WORDS,
  plain_encoding,
  to_stored,
)
from patchjax.history.encodings.planes import PLANES, from_planes, to_planes

ENCODINGS: dict[str, Encoding] = {
  encoding.name: encoding for encoding in (DENSE, WORDS, PLANES)
}
"""Every encoding by its name in indices."""
