"""The verbs, as a user types them, on a repository of a small model."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import patchjax as pj
from patchjax import interop, trees
from patchjax.cli.app import patchjax
from patchjax.vetting import Policy, Suite, Test, Verdict


def params(**changes):
  rng = np.random.default_rng(0)
  value = {
    "dense": {
      "kernel": rng.normal(size=(30, 40)).astype(np.float32),
      "bias": np.zeros(40, np.float32),
    },
    "out": rng.normal(size=(40, 5)).astype(np.float32),
  }
  for name, by in changes.items():
    if name == "out":
      value["out"] = value["out"] + np.float32(by)
    else:
      value["dense"][name] = value["dense"][name] + np.float32(by)
  return value


BASE, DUCK, FID = params(), params(kernel=0.01), params(bias=1, out=0.1)

# Suites as a user's module has them: right where a number is positive.
SUITE = Suite(
  "signs",
  "1",
  [
    Test("bias", lambda p: np.resize(p["dense"]["bias"] >= 0, 400)),
    Test("out", lambda p: np.resize(p["out"] < 5, 400)),
  ],
)
POLICY = Policy(margin=0.02)


def suite():
  return SUITE


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder of files and a repository with two branches off `main`."""
  folder = tmp_path_factory.mktemp("cli")
  for name, value in {"base": BASE, "duck": DUCK, "fid": FID}.items():
    interop.write(folder / f"{name}.safetensors", value)
  pj.diff(BASE, DUCK).save(folder / "fix.safetensors", base=BASE)
  repo = pj.Repo.init(folder / "repo")
  repo.commit(BASE, message="pretrained", author="Salban")
  repo.tag("v0")
  for name, value in {"duck": DUCK, "fid": FID}.items():
    repo.branch(name)
    message = f"tune {name}\n\nat length"
    repo.commit(value, message=message, branch=name, author=name)
  return folder


@pytest.fixture
def work(prepared, tmp_path, monkeypatch):
  shutil.copytree(prepared, tmp_path / "work")
  monkeypatch.chdir(tmp_path / "work")
  return tmp_path / "work"


def run(*arguments, code=0):
  result = CliRunner().invoke(patchjax, [str(a) for a in arguments])
  assert result.exit_code == code, result.output + repr(result.exception)
  return result.stderr if code == 2 else result.stdout


def run_json(*arguments, code=0):
  return json.loads(run(*arguments, "--json", code=code))


def test_init_commit_log_from_nothing(work):
  assert "repository in" in run("init", "new")
  made = run_json(
    *("-C", "new", "commit", "../base.safetensors"),
    *("-m", "first\n\nbody", "--author", "Me"),
  )
  assert made["tree"] == trees.tree_id(BASE)
  text = run("-C", "new", "log")
  assert f"commit {made['commit']} (main)\nAuthor: Me\nDate: " in text
  assert "\n    first\n\n    body\n" in text
  assert run("-C", "new", "init") == run("init", "new")


@pytest.mark.parametrize("name", ["duck.npz", "duck", "duck.safetensors"])
def test_commit_and_checkout_all_kinds_of_files(work, name):
  if name != "duck.safetensors":
    interop.write(name, DUCK)
  made = run("-C", "repo", "commit", f"../{name}", "-m", "tuned")
  assert made.startswith("[main ") and made.endswith("] tuned\n")
  run(
    "-C", "repo", "checkout", "main", "-o", f"../out{pathlib.Path(name).suffix}"
  )
  back = interop.read(f"out{pathlib.Path(name).suffix}")
  assert trees.tree_id(back) == trees.tree_id(DUCK)


def test_commit_of_a_patch_file_applies_and_keeps_it(work):
  made = run_json("-C", "repo", "commit", "../fix.safetensors", "-m", "fix")
  repo = pj.Repo("repo")
  assert (
    repo.objects.read(repo.show("main").patch)
    == (work / "fix.safetensors").read_bytes()
  )
  # apply gives to the bit what commit stores.
  run("apply", "base.safetensors", "fix.safetensors", "-o", "applied.npz")
  assert trees.tree_id(interop.read("applied.npz")) == made["tree"]
  run("-C", "repo", "apply", "v0", "../fix.safetensors", "-o", "../b.npz")
  assert trees.tree_id(interop.read("b.npz")) == made["tree"]
  assert "made by the patch file" in run("-C", "repo", "show")


def test_patch_files_may_have_any_name(work):
  shutil.copy("fix.safetensors", "0001-fix.patch")
  shutil.copy("fix.safetensors", "fix")
  run("-C", "repo", "apply", "main", "../fix", "-o", "../a.npz")
  run("-C", "repo", "commit", "../0001-fix.patch", "-m", "fix")
  assert pj.Repo("repo").show("main").patch is not None
  assert trees.tree_id(interop.read("a.npz")) == trees.tree_id(
    pj.Repo("repo").checkout("main")
  )
  for name in ("fix", "fix.safetensors"):
    text = run("diff", name, "base.safetensors", code=2)
    assert "is a patch, expected parameters" in text


def test_what_may_be_a_version_or_a_file_is_refused(work):
  interop.write("repo/duck", FID)
  text = run("-C", "repo", "diff", "main", "duck", code=2)
  assert "'duck' is a version and also a file" in text
  found = run_json("-C", "repo", "diff", "heads/duck", "./duck")
  assert found["leaves"]
  assert not run_json("-C", "repo", "diff", "fid", "./duck")["leaves"]


def test_a_patch_goes_on_its_own_base(work):
  text = run(
    "-C", "repo", "commit", "../fix.safetensors", "-m", "x", "-b", "fid", code=2
  )
  assert text.startswith("patchjax: wrong base: ")
  text = run(
    "apply", "fid.safetensors", "fix.safetensors", "-o", "x.npz", code=2
  )
  assert text.startswith("patchjax: wrong base: ")
  arguments = ("fid.safetensors", "fix.safetensors", "-o", "x.npz")
  run("apply", *arguments, "--any-base")
  moved = interop.read("x.npz")["dense"]["kernel"]
  np.testing.assert_array_equal(moved, DUCK["dense"]["kernel"])


def test_log_in_three_forms(work):
  commits = run_json("-C", "repo", "log", "duck")
  assert [c["message"].split("\n")[0] for c in commits] == [
    "tune duck",
    "pretrained",
  ]
  assert commits[0]["parents"] == [commits[1]["id"]]
  assert commits[1]["refs"] == ["main", "tag: v0"]
  lines = run("-C", "repo", "log", "duck", "--oneline").splitlines()
  assert lines == [
    f"{commits[0]['id'][:12]} (duck) tune duck",
    f"{commits[1]['id'][:12]} (main, tag: v0) pretrained",
  ]
  assert len(run_json("-C", "repo", "log", "duck", "-n", "1")) == 1
  assert run_json("-C", "repo", "log", "duck~1") == commits[1:]


def test_show_says_what_a_commit_is(work):
  text = run("-C", "repo", "show", "fid")
  assert "3 leaves, 1,440 parameters, 5.8 kB" in text
  assert "2 leaves differ from" in text and "dense/bias, out" in text
  shown = run_json("-C", "repo", "show", "fid")
  assert shown["changed"] == ["dense/bias", "out"]
  assert shown["bytes"] == 4 * 1440


def test_only_some_leaves(work):
  arguments = ("-C", "repo", "checkout", "fid", "-o", "../out.npz")
  run(*arguments, "--only", "dense/.*")
  assert set(trees.named_leaves(interop.read("out.npz"))) == {
    "dense/kernel",
    "dense/bias",
  }
  assert "exists" in run(*arguments, code=2)
  run(*arguments, "--force")
  assert len(trees.named_leaves(interop.read("out.npz"))) == 3
  assert "did you mean" in run(
    *arguments, "-f", "--only", "dense/kernle", code=2
  )


def test_branches_and_tags_are_listed_and_made(work):
  assert [b["name"] for b in run_json("-C", "repo", "branch")] == [
    "duck",
    "fid",
    "main",
  ]
  assert run("-C", "repo", "branch").splitlines()[0].endswith("  tune duck")
  run("-C", "repo", "branch", "next", "duck")
  run("-C", "repo", "tag", "v1", "next")
  assert run_json("-C", "repo", "tag")[1]["title"] == "tune duck"
  assert "patchjax: " in run("-C", "repo", "tag", "v1", "main", code=2)
  assert "patchjax: " in run("-C", "repo", "branch", "main", code=2)


def test_diff_of_refs_and_of_files_agree(work):
  stored = run_json("-C", "repo", "diff", "v0", "fid")
  assert [leaf["name"] for leaf in stored["leaves"]] == ["dense/bias", "out"]
  assert stored["count"] == 240
  assert stored == run_json("diff", "base.safetensors", "fid.safetensors")
  assert stored == run_json("-C", "repo", "diff", "v0", "../fid.safetensors")
  text = run("-C", "repo", "diff", "v0", "fid")
  assert "2 leaves differ, 1 are equal" in text
  assert max(map(len, text.splitlines())) <= 100
  assert run("-C", "repo", "diff", "v0", "--exit-code") != ""
  run("-C", "repo", "diff", "v0", "fid", "--exit-code", code=1)


def test_merge_with_and_without_options(work):
  made = run_json("-C", "repo", "merge", "duck", "fid", "-m", "both")
  repo = pj.Repo("repo")
  assert len(made["parents"]) == 3
  assert "Merge:  " in run("-C", "repo", "log")
  assert "recipe: " in run("-C", "repo", "show")
  run("-C", "repo", "branch", "other", "v0")
  found = repo.checkout("main")  # each changed other leaves: they are taken
  assert trees.tree_id(found["out"]) == trees.tree_id(FID["out"])
  assert trees.tree_id(found["dense"]["kernel"]) == trees.tree_id(
    DUCK["dense"]["kernel"]
  )
  options = "--method ties --density 0.5 --scale 0.5 --set scope=leaf --whole"
  run("-C", "repo", "merge", "duck", "fid", "--into", "other", *options.split())
  method = pj.merging.ties(density=0.5, scale=0.5, scope="leaf")
  want = pj.merge(BASE, [DUCK, FID], method)
  assert repo.show("other").tree == trees.tree_id(want)
  run("-C", "repo", "branch", "mean", "v0")
  weights = "--method linear --weights 3,1 --into mean --whole".split()
  run("-C", "repo", "merge", "duck", "fid", *weights)
  want = pj.merge(BASE, [DUCK, FID], pj.merging.linear(weights=[3, 1]))
  assert repo.show("mean").tree == trees.tree_id(want)


def test_merge_shows_conflicts_without_a_commit(work):
  before = run("-C", "repo", "log")
  text = run("-C", "repo", "merge", "duck", "--into", "fid", "--dry-run")
  assert "dense/kernel" in text
  assert max(map(len, text.splitlines())) <= 100
  assert run("-C", "repo", "log") == before
  # main is at the merge base, and no contributor.
  both = run_json("-C", "repo", "merge", "duck", "fid", "--dry-run")
  alone = run_json("-C", "repo", "merge", "duck", "--dry-run")
  assert both["total"]["changed"] > 0
  duck = pj.Repo("repo").resolve("duck")
  assert alone == {"contributors": [duck], "leaves": []}


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--method", "tise"], "did you mean 'ties'?"),
    (["--method", "linear", "--density", ".1"], "no argument 'density'"),
    (["--weights", "a,b"], "expected numbers such as 1,0.5"),
    (["--set", "scope"], "expected NAME=JSON"),
    (["--set", "flavour=sweet"], "flavour must be"),
  ],
)
def test_merge_says_what_its_methods_take(work, arguments, message):
  assert message in run("-C", "repo", "merge", "duck", *arguments, code=2)


HERE = "tests.cli.test_verbs"


def test_vet_stores_a_verdict_and_release_uses_it(work):
  refs = (
    "--against",
    "v0",
    "--suite",
    f"{HERE}:suite",
    "--policy",
    f"{HERE}:POLICY",
  )
  assert "released 1.0.0" in run("-C", "repo", "release", "v0")
  text = run("-C", "repo", "vet", "fid", *refs)
  assert text.startswith("accepted: suite signs")
  assert "verdict " in run("-C", "repo", "show", "fid")
  assert "released 1.0.1" in run("-C", "repo", "release", "fid")
  names = [tag["name"] for tag in run_json("-C", "repo", "tag")]
  assert names == ["v0", "v1.0.0", "v1.0.1"]


def test_what_fails_is_refused_with_exit_code_1(work):
  interop.write("bad.npz", params(bias=-1))
  run("-C", "repo", "branch", "bad")
  run("-C", "repo", "commit", "../bad.npz", "-m", "bad", "-b", "bad")
  run("-C", "repo", "release", "v0")
  (work / "policy.json").write_text(json.dumps(POLICY.to_json()))
  options = ("--suite", f"{HERE}:SUITE", "--policy", "../policy.json")
  text = run("-C", "repo", "vet", "bad", "--against", "v0", *options, code=1)
  assert text.startswith("refused: ")
  result = CliRunner().invoke(patchjax, ["-C", "repo", "release", "bad"])
  assert result.exit_code == 1
  assert result.stderr.startswith("patchjax: bad (")
  assert "cannot be released" in result.stderr


def test_files_are_vetted_without_a_repository(work):
  options = ("--against", "base.safetensors", "--suite", f"{HERE}:suite")
  verdict = run_json("vet", "duck.safetensors", *options)
  again = run_json("vet", "fix.safetensors", *options)
  assert verdict["outcome"] == "accepted"
  assert Verdict.from_json(verdict).id == Verdict.from_json(again).id


@pytest.mark.parametrize(
  "name, message",
  [
    ("nothing", "expected MODULE:NAME"),
    ("no_such_module:suite", "cannot import"),
    ("json:dumps", "callable without arguments"),
    (f"{HERE}:nothing", "cannot import"),
    (f"{HERE}:POLICY", "is a Policy, expected a Suite"),
  ],
)
def test_a_suite_must_be_one(work, name, message):
  options = ("--against", "base.safetensors", "--suite", name)
  assert message in run("vet", "duck.safetensors", *options, code=2)


def test_fsck_finds_damage(work):
  assert run_json("-C", "repo", "fsck")["ok"] is True
  victim = next(p for p in (work / "repo/objects").rglob("*") if p.is_file())
  victim.write_bytes(victim.read_bytes()[:-1] + b"x")
  found = run_json("-C", "repo", "fsck", code=1)
  assert found["problems"]
  assert "problem" in run("-C", "repo", "fsck", code=1)


def test_a_repository_is_found_from_inside_as_git_finds_it(work):
  assert run("-C", "repo/refs/heads", "log") == run("-C", "repo", "log")
  assert run("-C", "repo", "-C", "refs", "log") == run("-C", "repo", "log")


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["-C", "nowhere", "log"], "nowhere: No such file or directory"),
    (["log"], "is no patchjax repository"),
    (["-C", "repo", "log", "mian"], "mian"),
    (["-C", "repo", "show", "v0~9"], "v0~9"),
    (["-C", "repo", "commit", "x.npz", "-m", "x"], "x.npz: no such file"),
    (["-C", "repo", "commit", "../broken.safetensors", "-m", "x"], "truncated"),
    (["-C", "repo", "commit", "../empty.npz", "-m", "x"], "holds no arrays"),
    (
      ["-C", "repo", "commit", "../fid.safetensors", "-m", "x", "-b", "nope"],
      "no branch 'nope'",
    ),
    (
      ["apply", "base.safetensors", "duck.safetensors", "-o", "x"],
      "not a patch",
    ),
    (
      ["apply", "base.safetensors", "broken.safetensors", "-o", "x"],
      "truncated",
    ),
    (["-C", "repo", "checkout", "v0", "-o", "/nowhere/x.npz"], "/nowhere"),
    (
      ["-C", "repo", "checkout", "v0", "-o", "x.pkl"],
      "expected a name ending in",
    ),
    (["init", "base.safetensors"], "base.safetensors"),
    (["init", "."], "is not empty"),
    (["frobnicate"], "No such command"),
    (["-C", "repo", "commit", "../fid.safetensors"], "Missing option"),
  ],
)
def test_errors_are_one_message_on_stderr_and_exit_code_2(
  work, arguments, message
):
  whole = (work / "fix.safetensors").read_bytes()
  (work / "broken.safetensors").write_bytes(whole[:-9])
  np.savez(work / "empty.npz")
  result = CliRunner().invoke(patchjax, arguments)
  assert result.exit_code == 2
  assert message in result.stderr
  assert result.stdout == "" and "Traceback" not in result.stderr
  assert not (work / "x").exists() and not (work / "repo/x.pkl").exists()


def test_evidence_must_be_text(work):
  text = run(
    *("-C", "repo", "release", "--verdict", "../base.safetensors"), code=2
  )
  assert "base.safetensors: expected a text file" in text


def test_debug_shows_where_an_error_comes_from(work):
  result = CliRunner().invoke(patchjax, ["--debug", "log"])
  assert isinstance(result.exception, trees.PatchjaxError)


def test_the_installed_command_has_the_same_exit_codes(work):
  script = pathlib.Path(sys.executable).with_name("patchjax")
  for arguments, code in [(["-C", "repo", "log"], 0), (["log"], 2)]:
    done = subprocess.run(
      [script, *arguments], capture_output=True, text=True, cwd=work
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (code == 0)
  # A pipe that closes early is no error message.
  done = subprocess.run(
    f"{script} -C repo log | true", shell=True, capture_output=True, cwd=work
  )
  assert done.stderr == b""
