"""Tasks: deterministic splits that share no text and no article."""

import numpy as np
import pytest

from patchjax.demo import tasks

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer():
  words = [f"w{i}" for i in range(400)] + ["this", "text", "is"]
  vocabulary = {"[PAD]": 0, "[UNK]": 1}
  vocabulary |= {word: i + 2 for i, word in enumerate(words)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.enable_truncation(6)
  made.enable_padding(length=6)
  return made


def rows(groups=200, each=3):
  return [
    (f"review {g}", "positive" if g % 3 else "negative", f"w{g} w{g + 1} w{k}")
    for g in range(groups)
    for k in range(each)
  ]


def group_of(ids):
  return int(ids[0])


def test_no_group_is_in_two_splits(tokenizer):
  task = tasks.build("amazon", rows(), tokenizer)
  parts = [
    {group_of(ids) for ids in texts.ids}
    for texts in (task.train, task.validation, task.test)
  ]
  assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
  assert sum(map(len, parts)) == 200
  assert len(parts[2]) == pytest.approx(100, abs=25)


def test_splits_do_not_depend_on_the_order_of_the_rows(tokenizer):
  task = tasks.build("amazon", rows(), tokenizer)
  other = tasks.build("amazon", rows()[::-1], tokenizer)
  np.testing.assert_array_equal(task.test.ids, other.test.ids)
  np.testing.assert_array_equal(task.test.labels, other.test.labels)


def test_repeated_texts_count_once(tokenizer):
  once = tasks.build("amazon", rows(20), tokenizer)
  twice = tasks.build("amazon", rows(20) * 2, tokenizer)
  assert len(once.train) == len(twice.train)


def test_most_takes_the_first_texts(tokenizer):
  whole = tasks.build("amazon", rows(), tokenizer)
  some = tasks.build("amazon", rows(), tokenizer, {"train": 10})
  np.testing.assert_array_equal(some.train.ids, whole.train.ids[:10])
  assert len(some.test) == len(whole.test)


def test_tokens_are_padded_and_masked(tokenizer):
  task = tasks.build("amazon", rows(20), tokenizer)
  assert task.train.ids.shape[1] == 6
  assert task.train.mask.sum(axis=1).tolist() == [3] * len(task.train)
  assert not task.train.ids[~task.train.mask].any()
  assert task.prompts.labels.tolist() == [0, 1]


def test_files_are_read_as_they_are_written(tmp_path):
  path = tmp_path / "nyt.tsv"
  path.write_text(
    "1_1\t-0.9\tBad &amp; sad.\n1_2\t0.2\tNeutral\n2_1\t1.5\tGood\n"
  )
  assert tasks._read("nyt", path) == [
    ("1", "negative", "Bad & sad."),
    ("2", "positive", "Good"),
  ]
  path = tmp_path / "bbc.tsv"
  path.write_text("tech\tSome chip\n")
  assert tasks._read("bbc", path) == [("Some chip", "tech", "Some chip")]
