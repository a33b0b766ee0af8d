"""Texts from Debian packages: pinned, checked, read without installing."""

import hashlib
import io
import tarfile

import pytest

from experiments.merging import debian, tasks
from patchjax.trees import errors


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def member(name, content):
  """A member of an ar archive, padded to an even length."""
  header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
  return header.encode() + content + b"\n" * (len(content) % 2)


def package(files, compression="xz"):
  inner = io.BytesIO()
  with tarfile.open(fileobj=inner, mode=f"w:{compression}") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f"./{name}")
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
    link = tarfile.TarInfo("./link")
    link.type, link.linkname = tarfile.SYMTYPE, "words"
    tar.addfile(link)
  return (
    b"!<arch>\n"
    + member("debian-binary", b"2.0\n")
    + member("control.tar.xz", b"odd")
    + member(f"data.tar.{compression}", inner.getvalue())
  )


@pytest.fixture
def apt(tmp_path, monkeypatch):
  """An apt-get that copies what lies in a folder, and counts its calls."""
  folder, bin_dir = tmp_path / "index", tmp_path / "bin"
  folder.mkdir()
  bin_dir.mkdir()
  script = bin_dir / "apt-get"
  script.write_text(
    "#!/bin/sh\n"
    f"echo x >> {folder}/calls\n"
    f"if ls {folder}/*.deb > /dev/null 2>&1; then cp {folder}/*.deb .\n"
    "else echo 'E: not found' >&2; exit 100; fi\n"
  )
  script.chmod(0o755)
  monkeypatch.setenv("PATH", f"{bin_dir}:/usr/bin:/bin")
  return folder


def deb(archive, kept=b"some words"):
  return debian.Deb(
    name="words",
    version="1:2.0",
    sha256=sha256(archive),
    read=lambda files: {"words.txt": files["usr/words"]},
    files={"words.txt": sha256(kept)},
    megabytes=0.1,
  )


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_package_is_read_without_tools(compression):
  files = {"usr/words": b"some words", "usr/odd": b"abc"}
  assert debian.unpack(package(files, compression)) == {
    "usr/words": b"some words",
    "usr/odd": b"abc",
  }


@pytest.mark.parametrize("bad", [b"", b"PK\x03\x04", b"!<arch>\n"])
def test_other_files_are_no_packages(bad):
  with pytest.raises(errors.FormatError, match="Debian"):
    debian.unpack(bad)


def test_the_second_run_asks_nobody(apt, tmp_path):
  archive = package({"usr/words": b"some words"})
  apt.joinpath("words.deb").write_bytes(archive)
  said = []
  cache = tmp_path / "cache"
  for _ in range(2):
    paths = debian.fetch([deb(archive)], cache, echo=said.append)
  assert paths["words.txt"].read_text() == "some words"
  assert len(said) == 1 and "words=1:2.0" in said[0]
  assert apt.joinpath("calls").read_text() == "x\n"
  assert [p.name for p in cache.rglob("*") if p.is_file()] == ["words.txt"]


def test_a_damaged_file_is_fetched_again(apt, tmp_path):
  archive = package({"usr/words": b"some words"})
  apt.joinpath("words.deb").write_bytes(archive)
  path = debian.fetch([deb(archive)], tmp_path / "cache")["words.txt"]
  path.write_text("edited")
  debian.fetch([deb(archive)], tmp_path / "cache")
  assert path.read_text() == "some words"


@pytest.mark.parametrize("wrong", ["archive", "file"])
def test_what_is_not_pinned_is_not_kept(apt, tmp_path, wrong):
  archive = package({"usr/words": b"some words"})
  given = deb(archive, b"other words" if wrong == "file" else b"some words")
  if wrong == "archive":
    apt.joinpath("words.deb").write_bytes(archive + b"\n")
  else:
    apt.joinpath("words.deb").write_bytes(archive)
  with pytest.raises(errors.IntegrityError, match="expected sha256"):
    debian.fetch([given], tmp_path / "cache")
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_package_that_cannot_be_had_is_said(apt, tmp_path):
  with pytest.raises(ConnectionError, match="not found"):
    debian.fetch([deb(b"")], tmp_path / "cache")


def test_glosses_lose_their_examples_and_the_licence():
  noun = (
    b"  1 This software and database is being provided to you\n"
    b'00001 04 n 01 leap 0 000 | a light  jump; "he made a leap"  \n'
    b"00002 03 n 01 entity 0 000 | that which is  \n"
    b"00003 13 n 01 soup 0 000 | liquid food; often hot  \n"
  )
  read = tasks.read_wordnet(
    {"usr/share/wordnet/data.noun": noun, "usr/share/wordnet/data.verb": b""}
  )
  assert read["noun.tsv"] == (
    b"act\ta light jump\nfood\tliquid food; often hot\n"
  )
  assert read["verb.tsv"] == b""


def test_fortunes_are_cut_at_percent_signs():
  found = tasks.FORTUNES.read(
    {"usr/share/games/fortunes/law": b"One\n\tl_\baw.\n%\nTwo.\n%\n"}
  )
  assert found == {"fortunes.tsv": b"law\tOne law.\nlaw\tTwo.\n"}


def test_rows_come_from_both_packages(tmp_path):
  files = {
    name: tmp_path / name for name in ("fortunes.tsv", "fortunes-min.tsv")
  }
  files["fortunes.tsv"].write_text("law\tA law.\n")
  files["fortunes-min.tsv"].write_text("riddles\tWhy?\n")
  assert tasks.rows("fortunes", files) == [
    ("a law.", "law", "A law."),
    ("why?", "riddles", "Why?"),
  ]


def test_unknown_tasks_are_refused():
  with pytest.raises(ValueError, match="nouns"):
    tasks.load(["bbc", "nouns"], {}, tokens=8, most={})
