"""Texts that travel as Debian packages: fetched by apt, checked, unpacked.

A .deb is an `ar` archive with a tar file in it; both are read here, nothing
is installed and no script of a package is run. The few files that are needed
stay in the demo's cache; the second run touches no network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence

from patchjax.demo import data
from patchjax.trees import errors

_MAGIC = b"!<arch>\n"
_HEADER = 60


@dataclasses.dataclass(frozen=True)
class Deb:
  """One pinned package: what to ask apt for and what must come out of it.

  Attributes:
    name: of the package.
    version: the pinned version, as apt spells it.
    sha256: digest of the archive.
    read: from the files of the package to those that the cache keeps.
    files: sha256 of each kept file, by name.
    megabytes: size of the download, for the announcement.
  """

  name: str
  version: str
  sha256: str
  read: Callable[[Mapping[str, bytes]], dict[str, bytes]]
  files: Mapping[str, str]
  megabytes: float


def unpack(archive: bytes) -> dict[str, bytes]:
  """Returns the regular files of a .deb, by path.

  Args:
    archive: the bytes of the package.

  Raises:
    FormatError: if it is no Debian package.
  """
  if not archive.startswith(_MAGIC):
    raise errors.FormatError("not a Debian package: it is no ar archive")
  start = len(_MAGIC)
  while start + _HEADER <= len(archive):
    header = archive[start : start + _HEADER]
    name = header[:16].decode().strip().rstrip("/")
    size = int(header[48:58])
    start += _HEADER
    if name.startswith("data.tar"):
      inner = io.BytesIO(archive[start : start + size])
      with tarfile.open(fileobj=inner, mode="r:*") as tar:
        found = {}
        for info in tar:
          file = tar.extractfile(info) if info.isfile() else None
          if file is not None:
            found[info.name.removeprefix("./")] = file.read()
        return found
    start += size + size % 2
  raise errors.FormatError("not a Debian package: it holds no data.tar")


def fetch(
  debs: Sequence[Deb],
  cache: str | os.PathLike[str] | None = None,
  *,
  echo: Callable[[str], object] = lambda line: None,
) -> dict[str, pathlib.Path]:
  """Makes sure that the pinned files are in the cache and are intact.

  Args:
    debs: what to fetch.
    cache: folder to keep the files in; default the demo's.
    echo: receives one line for every download.

  Returns:
    The path of every file, by name.

  Raises:
    ConnectionError: if apt cannot fetch a package.
    IntegrityError: if what came is not what is pinned.
  """
  root = pathlib.Path(cache) if cache is not None else data.cache_dir()
  paths = {}
  for deb in debs:
    version = deb.version.replace(":", "_")
    folder = root / f"{deb.name}-{version}"
    if not all(_intact(folder / name, sha) for name, sha in deb.files.items()):
      echo(f"fetching {deb.name}={deb.version} ({deb.megabytes:.1f} MB)")
      folder.mkdir(parents=True, exist_ok=True)
      _keep(deb, folder)
    paths |= {name: folder / name for name in deb.files}
  return paths


def _intact(path: pathlib.Path, sha256: str) -> bool:
  return path.is_file() and _digest(path.read_bytes()) == sha256


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _keep(deb: Deb, folder: pathlib.Path) -> None:
  """Fetches a package and moves its checked files into the folder."""
  with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
    work = pathlib.Path(temporary)
    archive = _download(deb, work)
    _check(f"the package {deb.name}", _digest(archive), deb.sha256)
    for name, content in deb.read(unpack(archive)).items():
      _check(f"{name} of {deb.name}", _digest(content), deb.files[name])
      part = work / name
      part.write_bytes(content)
      os.replace(part, folder / name)


def _check(what: str, found: str, expected: str) -> None:
  if found != expected:
    raise errors.IntegrityError(
      f"{what}: expected sha256 {expected}, found {found}; it was not kept"
    )


def _download(deb: Deb, work: pathlib.Path) -> bytes:
  wanted = f"{deb.name}={deb.version}"
  remedy = (
    f"On a machine without it, copy the folder {work.parent} from one that "
    "has run this, or leave its tasks out: --config.tasks=..."
  )
  apt = shutil.which("apt-get")
  if apt is None:
    raise ConnectionError(
      f"{wanted} is fetched by apt-get, not found. {remedy}"
    )
  done = subprocess.run(
    # As root apt would hand the download to a user who may not write here.
    [apt, "-q", "-o", "APT::Sandbox::User=root", "download", wanted],
    cwd=work,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  found = sorted(work.glob("*.deb"))
  if done.returncode or not found:
    said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-5:])
    raise ConnectionError(
      f"apt-get cannot download {wanted}:\n{said}\n"
      f"If its index is old: apt-get update. {remedy}"
    )
  return found[0].read_bytes()
