"""The whole story in a tiny world, where most of it does not work out."""

import dataclasses

import pytest

import patchjax as pj
from patchjax.demo import desk, report, running
from patchjax.demo.story import Story
from patchjax.trees import errors
from patchjax.vetting import Policy
from tests.demo import world


@pytest.fixture(scope="module")
def played(tmp_path_factory):
  repo = pj.Repo.init(tmp_path_factory.mktemp("story") / "repo")
  said = []
  story = Story(repo, world.scorer(), world.CONFIG, said.append)
  story.play()
  return repo, story, "\n".join(said)


def test_every_event_is_told(played):
  _, _, said = played
  for number in "12346":
    assert f"\n{number}. " in said


def test_the_repository_is_sound(played):
  repo, _, _ = played
  assert repo.fsck().ok
  assert {"main", "ducksville", "control", "fidmor", "ties", "sum"} <= set(
    repo.branches()
  )
  assert {"tasks/amazon", "tasks/nyt", "2-bit", "8-bit"} <= set(repo.branches())
  assert "v1.0.0" in repo.tags()


def test_submitted_files_are_kept(played):
  repo, story, _ = played
  patch = repo.patch_of("ducksville")
  assert patch.base == repo.show("v1.0.0").tree
  assert story.facts["ducksville, bytes"] >= patch.nbytes


def test_verdicts_are_stored_with_the_candidates(played):
  repo, _, _ = played
  for branch in ("ducksville", "fidmor", "2-bit"):
    notes = repo.annotations(branch, "verdict")
    assert notes and notes[-1]["payload"]["outcome"]


def test_what_fails_is_said_and_the_story_goes_on(played):
  _, story, _ = played
  # Sixty texts decide nothing: the gate cannot accept, and nobody pretends.
  assert story.releases == ["1.0.0"]
  assert "ducksville" in story.rejected
  assert any("no merge passed" in problem for problem in story.problems)
  assert "1.0.0" in [line.version for line in story.lines]


def test_a_kinder_gate_leads_to_a_second_release(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "patchjax.demo.evidence.contribution_policy",
    lambda config: Policy(margin=0.9, flips=None),
  )
  monkeypatch.setattr(
    "patchjax.demo.evidence.parent_policy",
    lambda config: Policy(margin=0.9, flips=None),
  )
  monkeypatch.setattr(
    "patchjax.demo.story.CLAIMS",
    {
      "ducksville": "tweets",
      "fidmor": "bbc",
    },
  )
  repo = pj.Repo.init(tmp_path / "repo")
  config = dataclasses.replace(world.CONFIG, steps=2)
  story = Story(repo, world.scorer(), config, lambda line: None)
  # Claims of a gain cannot be met by a random model.
  gate = story.gate
  monkeypatch.setattr(
    story, "gate", lambda old, new, claims=(), **rest: gate(old, new, **rest)
  )
  story.play()
  assert story.releases == ["1.0.0", "1.0.1"]
  assert repo.show("main").tree == repo.show("v1.0.1").tree
  assert repo.fsck().ok


def test_the_report_is_readable(played):
  repo, story, _ = played
  text = str(
    report.Report(
      directory=repo.path,
      lines=tuple(story.lines),
      checkpoint=100_000,
      releases=tuple(story.releases),
      rejected=tuple(story.rejected),
      problems=tuple(story.problems),
      facts=story.facts,
      cost=report.Cost(),
    )
  )
  assert all(len(line) <= 100 for line in text.split("\n")[:12])
  assert "not as told" in text


def test_an_existing_directory_is_never_overwritten(tmp_path):
  said = []
  directory = tmp_path / "clamp-demo"
  assert running._place(directory, False, said.append) == directory
  directory.mkdir()
  assert running._place(directory, False, said.append) == directory
  (directory / "mine.txt").write_text("dear to me")
  second = running._place(directory, False, said.append)
  assert second.name == "clamp-demo-2" and "kept" in said[0]
  with pytest.raises(errors.RepositoryError, match="no patchjax repository"):
    running._place(directory, True, said.append)
  assert (directory / "mine.txt").read_text() == "dear to me"


def test_force_replaces_a_repository_only(tmp_path):
  directory = tmp_path / "clamp-demo"
  pj.Repo.init(directory)
  assert running._place(directory, True, print) == directory
  assert not directory.exists()


def test_suite_needs_the_demos_repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.NotARepositoryError):
    running.suite()
  repo = pj.Repo.init(tmp_path / "other")
  repo.commit(world.scorer().base, message="another model")
  repo.tag("v1.0.0")
  monkeypatch.chdir(tmp_path / "other")
  with pytest.raises(errors.RefNotFoundError, match="not written by the demo"):
    running.suite()


def test_note_of_the_release_names_its_suite(played):
  repo, story, _ = played
  note = repo.annotations("v1.0.0", desk.NOTE)[-1]["payload"]
  assert note["tuned"] == ["amazon", "nyt"]
  assert note["sizes"] == {
    task: len(made.test) for task, made in story.scorer.tasks.items()
  }
