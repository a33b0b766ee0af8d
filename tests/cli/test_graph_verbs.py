"""The verbs on the graph, as a user types them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import patchjax as pj
from patchjax.cli.app import patchjax


def value(number, **others):
  return {"w": np.full(4, number, np.float32), "v": np.ones(3, np.float32)} | {
    name: np.full(3, x, np.float32) for name, x in others.items()
  }


@pytest.fixture
def repo(tmp_path, monkeypatch):
  """main: 0 to 5; side: from 1, a merge of it at the end."""
  repo = pj.Repo.init(tmp_path / "repo")
  for i in range(3):
    repo.commit(value(i), message=f"step {i}", author="Ada", time=float(i))
  repo.tag("v1", "main~1")
  repo.branch("side", "v1")
  tuned = value(1, v=7)
  repo.commit(tuned, message="side", branch="side", author="Bob", time=5.0)
  merge = pj.merging.linear()
  repo.merge("main", "side", method=merge, author="Ada", time=6.0)
  monkeypatch.chdir(repo.path)
  return repo


def run(*arguments, code=0):
  result = CliRunner().invoke(patchjax, [str(a) for a in arguments])
  assert result.exit_code == code, result.output + repr(result.exception)
  return result.stderr if code == 2 else result.stdout


def run_json(verb, *arguments, code=0):
  return json.loads(run(verb, "--json", *arguments, code=code))


def test_log(repo):
  ids = {commit.title: commit.id[:12] for commit in repo.log()}
  merge = ids["Merge side into main"]
  assert run("log", "--graph", "--oneline") == (
    f"* {merge} (main) Merge side into main\n"
    "|\\\n"
    f"| * {ids['side']} (side) side\n"
    f"* | {ids['step 2']} step 2\n"
    "|/\n"
    f"* {ids['step 1']} (tag: v1) step 1\n"
    f"* {ids['step 0']} step 0\n"
  )
  long = run("log", "--graph", "-n", "1").splitlines()
  assert long[0].startswith("*   commit ") and long[1].startswith("|\\  Merge:")
  names = run_json("log", "--name", "v")
  assert [c["message"] for c in names] == ["side", "step 0"]
  drawn = run("log", "--graph", "--oneline", "--name", "v").splitlines()
  assert [row[0] for row in drawn] == ["*", "*"]
  assert len(run_json("log", "v1..main")) == 3
  assert len(run_json("log", "main", "^side")) == 2
  repo.reset("v1")
  assert len(run_json("log")) == 2
  assert len(run_json("log", "--all")) == 3
  assert run("log", "-n", "1", "--oneline").endswith("step 1\n")
  assert "no branch, tag" in run("log", "absent", code=2)


def test_a_damaged_ref_is_a_warning(repo):
  with open(repo.files.path("refs/heads/bad"), "w") as file:
    file.write("x")
  for verb in (["log", "--oneline"], ["branch"]):
    done = subprocess.run(
      [sys.executable, "-m", "patchjax.cli", *verb],
      capture_output=True,
      text=True,
      check=True,
    )
    assert "warning: branch 'bad' is damaged" in done.stderr
    assert "Merge side into main" in done.stdout


def test_blame_and_merge_base(repo):
  text = run("blame")
  assert "Bob" in text and "1970-01-01" in text
  found = {row["leaf"]: row["title"] for row in run_json("blame")}
  assert found == {"v": "side", "w": "step 2"}
  assert len(run_json("blame", "--only", "w")) == 1
  assert run("merge-base", "main~1", "side").strip() == repo.resolve("v1")
  assert run_json("merge-base", "--all", "main~1", "side") == {
    "commits": [repo.resolve("v1")]
  }


def test_branches_tags_and_the_reflog(repo):
  tip = repo.resolve("side")
  run("branch", "-m", "side", "topic")
  repo.commit(value(9), message="more", branch="topic")
  assert "force=True (-D)" in run("branch", "-d", "topic", code=2)
  assert run("branch", "-D", "topic").startswith("deleted branch topic (was ")
  assert run("reflog", "topic").splitlines()[0] == (
    "------------ topic@{0}: branch: deleted"
  )
  run("branch", "topic", "topic@{2}")
  assert repo.resolve("topic") == tip
  run("branch", "-d", "topic")
  assert "now at" in run("reset", "v1")
  log = run_json("reflog", "-n", "1")
  assert (log[0]["why"], log[0]["new"]) == (
    "reset: moving to v1",
    repo.resolve("v1"),
  )
  run("reset", "main@{1}")
  assert len(repo.log()) == 5
  assert run("tag", "-d", "v1").startswith("deleted tag v1")
  assert run_json("tag") == []


def test_merges_say_what_they_did(repo):
  for options in ([], ["--dry-run"]):
    text = run("merge", "side", *options)
    assert text == "main has it all already: nothing to merge\n"
    assert run_json("merge", "side", *options)["merged"] is False
  repo.branch("old", "v1")
  assert "one side changed" in run(
    "merge", "side", "--into", "old", "--dry-run"
  )
  assert "fast-forward to side" in run("merge", "side", "--into", "old")
  repo.branch("other", "v1")
  run("merge", "side", "--into", "other", "--no-ff", "-m", "kept")
  assert len(repo.show("other").parents) == 2
  assert "the same value again" in run("replay")
  assert run_json("replay", "other")["same"] is True
  assert "has no recipe" in run("replay", "v1", code=2)


def test_revert_pick_and_rebase(repo):
  made = run_json("revert", "side")
  assert made["tree"] == pj.trees.tree_id(value(2))
  assert 'Revert "side"' in run("log", "-n", "1")
  assert "--mainline" in run("revert", "--help")
  assert "mainline=1" in run("revert", "main~1", code=2)
  [picked] = run_json("cherry-pick", "side")
  assert picked["commit"] == repo.resolve("main")
  assert repo.show().author == "Bob"
  assert "has all that" in run("cherry-pick", "side", code=2)
  repo.branch("topic", "v1")
  repo.commit(value(5), message="five", branch="topic")
  assert "4 of 4 entries" in run("rebase", "main", "topic", code=2)
  told = run("rebase", "main", "topic", "--method", "task_arithmetic")
  assert "on top of main" in told
  assert np.asarray(repo.checkout("topic")["w"]).tolist() == [6] * 4
  assert "up to date" in run("rebase", "main", "topic")
  assert "no argument 'x'" in run(
    "revert", "--method", "linear", "--set", "x=1", code=2
  )


@pytest.fixture
def line(tmp_path, monkeypatch):
  repo = pj.Repo.init(tmp_path / "line")
  for i in range(8):
    repo.commit(value(i), message=f"step {i}")
  monkeypatch.chdir(repo.path)
  return repo


def test_bisect_by_a_command(line, tmp_path):
  program = tmp_path / "check.py"
  program.write_text(
    "import os, sys\n"
    "from patchjax.history import Repo\n"
    "title = Repo('.').show(os.environ['PATCHJAX_COMMIT']).title\n"
    "number = int(title.split()[1])\n"
    "sys.exit({5: 125, 9: 130}.get(number, 1 if number > 2 else 0))\n"
  )
  command = ["--", sys.executable, program]
  found = run_json("bisect", "main~7", "main", *command)
  assert line.show(found["first"]).title == "step 3"
  assert "first bad commit: step 3" in run("bisect", "main~7", "main", *command)
  for i in (8, 9):
    line.commit(value(i), message=f"step {i}")
  line.commit(value(10), message="step 10")
  assert (
    "130"
    in CliRunner()
    .invoke(patchjax, ["bisect", "main~2", "main", *map(str, command)])
    .stderr
  )
  found = run_json("bisect", "main~6", "main~5", *command, code=0)
  assert line.show(found["first"]).title == "step 5"


def test_bisect_that_cannot_tell_exits_with_1(line, tmp_path):
  command = ["--", sys.executable, "-c", "import sys; sys.exit(125)"]
  found = run_json("bisect", "main~2", "main", *command, code=1)
  assert found["first"] is None and len(found["candidates"]) == 2


def test_bisect_with_exported_versions(line, tmp_path):
  out = tmp_path / "version.npz"
  program = (
    "import os, sys, numpy as np\n"
    f"assert os.environ['PATCHJAX_PARAMS'] == {str(out)!r}\n"
    f"sys.exit(int(np.load({str(out)!r})['w'][0] >= 6))\n"
  )
  arguments = ["--export", out, "--", sys.executable, "-c", program]
  found = run_json("bisect", "main~7", "main", *arguments)
  assert line.show(found["first"]).title == "step 6"
  assert not out.exists()
  out.write_bytes(b"mine")
  assert "name a new path" in run("bisect", "v", "main", *arguments, code=2)
  assert out.read_bytes() == b"mine"


def test_bisect_by_a_suite(line, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "bisect_suite.py").write_text(
    "import numpy as np\n"
    "from patchjax.vetting import Policy, Suite, Test\n"
    "POLICY = Policy(margin=0.02)\n"
    "def right(p): return np.resize(np.asarray(p['w']) < 4, 400)\n"
    "SUITE = Suite('s', '1', [Test('ok', right)])\n"
  )
  options = ["--suite", "bisect_suite:SUITE", "--policy", "bisect_suite:POLICY"]
  found = run_json("bisect", "main~7", "main", *options)
  assert line.show(found["first"]).title == "step 4"
  assert "needs" in run("bisect", "main~7", "main", code=2)


def test_commits_need_words_and_may_be_put_together(repo, tmp_path):
  path = tmp_path / "x.npz"
  pj.interop.write(path, value(3))
  for message in ("", "  "):
    assert "message is empty" in run("commit", path, "-m", message, code=2)
  assert "--retry" in run("commit", "--help")
  told = run("commit", path, "-m", "mine", "--on", "v1", code=2)
  assert "Merge side into main" in told  # who moved it
  tip = repo.resolve("main")
  pj.interop.write(path, value(1, new=4), overwrite=True)
  run("commit", path, "-m", "mine", "--on", "v1", "--retry")
  assert repo.show().parents == (tip,)
  assert repo.show().tree == pj.trees.tree_id(value(2, v=7, new=4))


def test_a_patch_file_without_a_base_has_to_be_asked_for(repo, tmp_path):
  path = tmp_path / "fix.safetensors"
  pj.diff(value(2, v=7), value(5, v=7)).save(path)
  for verb in (
    ["commit", path, "-m", "fix"],
    ["apply", "main", path, "-o", "x"],
  ):
    assert "does not say for which value" in run(*verb, code=2)
  with pytest.raises(pj.trees.errors.BaseMismatchError):
    repo.commit(path, message="fix")
  run("commit", path, "-m", "fix", "--any-base")
  assert repo.show().tree == pj.trees.tree_id(value(5, v=7))
  assert repo.objects.read(repo.show().patch) == path.read_bytes()
  other = pj.diff(value(1), value(2)).replace(base="0" * 64)
  with pytest.raises(pj.trees.errors.BaseMismatchError):
    repo.commit(other, message="more")
  repo.commit(other, message="more", any_base=True)
