"""The demo's five tasks: one text, a few classes, no head to train.

Every task is scored as CLIP does (Radford et al., 2021): a class is described
by a sentence, the released model turns the sentence into a vector once and
for all, and a text belongs to the class whose vector is nearest. The heads
are frozen, so a task works with any version of the encoder, a patch holds
encoder parameters only, and each task has a zero-shot score.

Splits depend on nothing but the text: a text's group (its article or review,
where the data says so) is hashed to a number, and the number decides. No
article or review is in two splits.
"""

import dataclasses
import hashlib
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  import tokenizers

NAMES = ("bbc", "tweets", "movies", "amazon", "nyt")
SENTIMENT = ("tweets", "movies", "amazon", "nyt")

_CLASSES = {
  "bbc": ("business", "entertainment", "politics", "sports", "tech"),
  **dict.fromkeys(SENTIMENT, ("negative", "positive")),
}
# Described alike, the four sentiment tasks share one head.
_PROMPT = {
  "bbc": "This is a news article about {}.",
  **dict.fromkeys(SENTIMENT, "This text is {}."),
}
# Long before this a text is longer than the model gets to see.
_CHARACTERS = 1000
# Shares of the texts by their hash; what remains is for training.
_TEST, _VALIDATION = 0.50, 0.15


@dataclasses.dataclass(frozen=True)
class Texts:
  """Tokenized texts.

  Attributes:
    ids: token ids, shape `[n, length]`, int32, padded with 0.
    mask: True at tokens.
    labels: class of each text, shape `[n]`, int32.
  """

  ids: np.ndarray
  mask: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, n: int) -> "Texts":
    """The first `n` texts; the order is that of a hash, so a fair sample."""
    return Texts(self.ids[:n], self.mask[:n], self.labels[:n])


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: its classes, the sentences that describe them, its texts.

  Attributes:
    name: one of `NAMES`.
    classes: names of the classes, in the order of the labels.
    prompts: the tokenized sentences, one a class.
    train: texts to train on.
    validation: texts to choose settings on.
    test: texts that only a gate looks at.
  """

  name: str
  classes: tuple[str, ...]
  prompts: Texts
  train: Texts
  validation: Texts
  test: Texts


def load(
  files: Mapping[str, pathlib.Path],
  *,
  tokens: int,
  most: Mapping[str, int] | None = None,
  names: Sequence[str] = NAMES,
) -> dict[str, Task]:
  """Reads, splits and tokenizes all tasks.

  Args:
    files: paths as `data.fetch` gives them.
    tokens: longest text, in tokens; the rest is cut off.
    most: how many texts of a split are wanted at most, by its name; the order
      is that of a hash, so the first ones are a fair sample.
    names: which tasks.

  Returns:
    Task by name.

  Raises:
    ImportError: the extra `demo` is not installed.
  """
  cutter = tokenizer(files["tokenizer.json"], tokens)
  return {
    name: build(name, _read(name, files[f"{name}.tsv"]), cutter, most)
    for name in names
  }


def tokenizer(path: pathlib.Path, tokens: int) -> "tokenizers.Tokenizer":
  """The model's tokenizer, which cuts and pads to `tokens`.

  Args:
    path: a tokenizer.json.
    tokens: how many.

  Raises:
    ImportError: the extra `demo` is not installed.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      "the demo needs the package tokenizers: pip install 'patchjax[demo]'"
    ) from error
  made = tokenizers.Tokenizer.from_file(str(path))
  made.enable_truncation(tokens)
  made.enable_padding(length=tokens)
  return made


def _read(name: str, path: pathlib.Path) -> list[tuple[str, str, str]]:
  """The (group, class, text) of every usable line of a file."""
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  rows = []
  for line in lines:
    if name == "bbc":
      topic, text = line.split("\t", 1)
      rows.append((text, topic, text))
    else:
      key, score, text = line.split("\t", 2)
      # Near zero the raters disagree about the sign.
      if abs(float(score)) < 0.5:
        continue
      text = html.unescape(text.strip())
      grouped = name in ("amazon", "nyt")
      group = key.split("_")[0] if grouped else text.lower()
      rows.append((group, "positive" if float(score) > 0 else "negative", text))
  return rows


def _hash(text: str) -> float:
  """A number in [0, 1) that depends on nothing but the text."""
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def build(
  name: str,
  rows: list[tuple[str, str, str]],
  tokenizer: "tokenizers.Tokenizer",
  most: Mapping[str, int] | None = None,
  *,
  prompts: Mapping[str, str] | None = None,
) -> Task:
  """Splits and tokenizes the rows of one task.

  Args:
    name: one of `NAMES`, or with `prompts` any.
    rows: group, class and text of each example; repeated texts count once.
    tokenizer: pads and truncates.
    most: as for `load`.
    prompts: a sentence for each class; by default those of `NAMES`.

  Returns:
    The task.
  """
  if prompts is None:
    prompts = {kind: _PROMPT[name].format(kind) for kind in _CLASSES[name]}
  classes = tuple(prompts)
  unique = {text.lower(): (group, kind, text) for group, kind, text in rows}
  splits: dict[str, list[tuple[str, str]]] = {
    "train": [],
    "validation": [],
    "test": [],
  }
  for group, kind, text in sorted(
    unique.values(), key=lambda row: _hash(f"order/{name}/{row[2]}")
  ):
    place = _hash(f"split/{name}/{group}")
    if place < _TEST:
      split = "test"
    elif place < _TEST + _VALIDATION:
      split = "validation"
    else:
      split = "train"
    splits[split].append((kind, text))

  def tokenized(examples: list[tuple[str, str]]) -> Texts:
    encodings = tokenizer.encode_batch(
      [text[:_CHARACTERS] for _, text in examples]
    )
    return Texts(
      ids=np.array([e.ids for e in encodings], np.int32),
      mask=np.array([e.attention_mask for e in encodings], bool),
      labels=np.array([classes.index(k) for k, _ in examples], np.int32),
    )

  return Task(
    name=name,
    classes=classes,
    prompts=tokenized(list(prompts.items())),
    **{
      split: tokenized(examples[: (most or {}).get(split)])
      for split, examples in splits.items()
    },
  )
