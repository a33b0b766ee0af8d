"""The hunts of `experiments.bench.faults`, in small."""

import re
import subprocess
import sys

import pytest


def hunt(*arguments):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench.faults", *arguments],
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "all is well" in done.stdout
  return done.stdout


@pytest.mark.parametrize(
  "verb", ["commit", "commit (blob)", "merge", "repack", "gc", "push"]
)
def test_killed_verbs_do_no_harm(verb):
  said = hunt("--kills", "1", "--stride", "29", "--verbs", verb)
  assert "storage operations counted: " in said
  kills = re.findall(r"(\d+) kills, (\d+) repositories sound, 0 failures", said)
  assert len(kills) == 2
  assert all(int(n) == int(sound) > 0 for n, sound in kills)


def test_flipped_bits_are_noticed():
  said = hunt("--flips", "24")
  [total] = re.findall(r"all +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)", said)
  count, checkout, fsck, harmless, failed = map(int, total)
  assert count == checkout + fsck + harmless == 24
  assert checkout and fsck and not failed


def test_no_commit_of_several_writers_is_lost():
  said = hunt("--writers", "3", "--commits", "4")
  assert "12 commits in the history, 0 lost, ids verified" in said
