"""The hunts of `experiments.bench.faults`, in small, by one process."""

import re
import subprocess
import sys

import pytest

VERBS = ["commit", "commit (blob)", "merge", "repack", "gc", "push"]


@pytest.fixture(scope="module")
def said():
  """What the program prints; it ends with 0 only if all is well."""
  small = "--kills 2 --stride 71 --flips 22 --writers 3 --commits 4"
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench.faults", *small.split()],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "all is well" in done.stdout
  return done.stdout


def test_killed_verbs_do_no_harm(said):
  assert "storage operations counted: " in said
  for verb in VERBS:
    assert re.search(rf"every operation +{re.escape(verb)} +\w+ .* [1-9]", said)
  kills = re.findall(r"(\d+) kills, (\d+) repositories sound, 0 failures", said)
  assert len(kills) == 2
  assert all(int(n) == int(sound) > 0 for n, sound in kills)


def test_flipped_bits_are_noticed(said):
  [total] = re.findall(r"all +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)", said)
  count, checkout, fsck, harmless, failed = map(int, total)
  assert count == checkout + fsck + harmless == 22
  assert checkout and fsck and not failed


def test_no_commit_of_several_writers_is_lost(said):
  assert "12 commits in the history, 0 lost, ids verified" in said
