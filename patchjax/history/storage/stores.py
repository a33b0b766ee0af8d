"""Files in a bucket: `gs://` and `s3://` through TensorStore's stores.

TensorStore does the input and output; nothing here speaks HTTP. What tells it
where to look and who we are comes from the environment:

* `s3://bucket/path`: `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` (and
  `AWS_SESSION_TOKEN`), else the profile of `~/.aws`, else the machine's role;
  `AWS_REGION` or `AWS_DEFAULT_REGION`, else the bucket is asked;
  `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for stores that speak S3.
* `gs://bucket/path`: `GOOGLE_APPLICATION_CREDENTIALS`, else what
  `gcloud auth application-default login` left, else the machine's account;
  `TENSORSTORE_GCS_HTTP_URL` for other endpoints.
* `memory://path`: the memory of this process; for tests.

A value is written by one request, so that it is there as a whole or not at
all. A ref is swapped by a conditional request: `If-Match` and `If-None-Match`
on S3, a generation on Google's storage. Both decide on the server, but not all
that speak S3 know these headers: an endpoint of one's own is put to the test
before the first swap, and refused if two writers of one key both win. Deletion
is conditional on `gs://` alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from patchjax.history.storage.files import TEMPORARY, Files, is_temporary
from patchjax.trees.errors import RepositoryError

if TYPE_CHECKING:
  import tensorstore as ts

SCHEMES = ("gs", "s3", "memory")

# Answers come within seconds or not at all: a wrong endpoint must not hang.
_RETRIES = {"max_retries": 5, "initial_delay": "250ms", "max_delay": "2s"}
_CONTENDERS = 8  # who race for one key when an endpoint is put to the test

_ERRORS = (
  KeyError,
  NotImplementedError,
  OSError,
  RuntimeError,
  TypeError,
  ValueError,
)


@functools.cache
def _context(pid: int, has_keys: bool) -> ts.Context:
  """Connections and credentials that all stores of a process share."""
  del pid  # a fork must not inherit connections
  import tensorstore as ts

  # With keys in the environment, Amazon's client need not search (and
  # complain on stderr about) files that are not there.
  credentials = {"type": "environment" if has_keys else "default"}
  return ts.Context(
    {
      "aws_credentials": credentials,
      "s3_request_retries": _RETRIES,
      "gcs_request_retries": _RETRIES,
    }
  )


class StoreFiles(Files):
  """Files in a bucket. Folders are what keys have in common.

  Attributes:
    root: the URL, without a slash at its end.
    local: False.
  """

  local = False

  def __init__(self, root: str):
    """Names a place; nothing is opened before it is used.

    Args:
      root: its URL.

    Raises:
      RepositoryError: if it is no URL of a bucket.
    """
    self.root = root.rstrip("/")
    url = urlsplit(self.root)
    if url.scheme not in SCHEMES or not url.netloc:
      raise RepositoryError(
        f"{root!r} is no place for a repository: expected a folder, "
        "gs://BUCKET/PATH or s3://BUCKET/PATH"
      )
    self.scheme = url.scheme
    self._bucket = url.netloc
    self._prefix = url.path.strip("/")
    self._proven = False

  def path(self, key: str) -> str:
    return self.root if key == "." else f"{self.root}/{key}"

  def _full(self, key: str) -> str:
    """Returns a key as it is in the bucket."""
    parts = (self._prefix, key)
    return "/".join(part for part in parts if part not in ("", "."))

  def spec(self, key: str) -> dict[str, Any]:
    path = self._full(key)
    return self._spec(f"{path}/" if path else "")

  def _spec(self, path: str) -> dict[str, Any]:
    if self.scheme == "memory":
      return {"driver": "memory", "path": f"{self._bucket}/{path}"}
    if self.scheme == "gs":
      return {"driver": "gcs", "bucket": self._bucket, "path": path}
    found = {"driver": "s3", "bucket": self._bucket, "path": path}
    region = _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    endpoint = _endpoint("s3")
    if endpoint is not None:
      found["endpoint"] = endpoint
      region = region or "us-east-1"
    if region is not None:
      found["aws_region"] = region
    return found

  @property
  def context(self) -> ts.Context:
    """The TensorStore context to open `spec` in."""
    return _context(os.getpid(), "AWS_ACCESS_KEY_ID" in os.environ)

  @functools.cached_property
  def _store(self) -> ts.KvStore:
    import tensorstore as ts

    try:
      # The whole bucket: TensorStore cuts prefixes off without looking.
      return ts.KvStore.open(self._spec(""), context=self.context).result()
    except _ERRORS as error:
      raise self._failed(".", "opened", error) from error

  def cache(self, name: str) -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = f"{_endpoint(self.scheme)} {self.root}".encode()
    folder = hashlib.sha256(place).hexdigest()[:32]
    return os.path.join(base, "patchjax", folder, name)

  def read(self, key: str) -> bytes:
    return self._read(key, None)

  def read_range(self, key: str, start: int, stop: int) -> bytes:
    try:
      return self._read(key, slice(start, stop))
    except _PastTheEnd:
      # The store does not say where it ends; what is there is wanted.
      return self.read(key)[start:stop]

  def _read(self, key: str, part: slice | None) -> bytes:
    try:
      found = self._store.read(self._full(key), byte_range=part).result()
    except _ERRORS as error:
      if str(error).startswith("OUT_OF_RANGE"):
        raise _PastTheEnd(key) from error
      raise self._failed(key, "read", error) from error
    if found.state != "value":
      raise FileNotFoundError(f"there is no {self.path(key)}")
    return bytes(found.value)

  def pieces(self, key: str) -> Iterator[bytes]:
    # One request a file: a store answers at its own pace, and charges each.
    yield self.read(key)

  def size(self, key: str) -> int | None:
    if not self._has(key):
      raise FileNotFoundError(f"there is no {self.path(key)}")
    return None

  def exists(self, key: str) -> bool:
    return self._has(key) or bool(self._keys(key))

  def holding(self, folder: str, name: str) -> list[str]:
    # One listing instead of a request a folder.
    places = (key.split("/") for key in self._keys(folder))
    return sorted(p[0] for p in places if p[1:] == [name])

  def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
    asked = [(key, self._store.read(self._full(key))) for key in keys]
    found = {}
    for key, future in asked:
      try:
        result = future.result()
      except _ERRORS as error:
        raise self._failed(key, "read", error) from error
      if result.state == "value":
        found[key] = bytes(result.value)
    return found

  def _has(self, key: str) -> bool:
    try:
      # No bytes of it: this asks for the head alone.
      found = self._store.read(self._full(key), byte_range=slice(0, 0)).result()
    except _ERRORS as error:
      raise self._failed(key, "read", error) from error
    return found.state == "value"

  def holds(self, key: str, size: int) -> bool:
    del size  # written by one request: whole, or not there
    return self._has(key)

  def freshen(self, key: str) -> bool:
    # TensorStore tells no times of a bucket's files.
    return self._has(key)

  def _keys(self, folder: str) -> list[str]:
    """Returns the keys below a folder, relative to it."""
    import tensorstore as ts

    prefix = self._full(folder)
    # "0" is the character after "/": all that starts with the prefix.
    keys = ts.KvStore.KeyRange(prefix and f"{prefix}/", prefix and f"{prefix}0")
    prefix += "/" if prefix else ""
    try:
      found = [key.decode() for key in self._store.list(keys).result()]
    except _ERRORS as error:
      raise self._failed(folder, "listed", error) from error
    # Some servers return more than they were asked for.
    return sorted(k.removeprefix(prefix) for k in found if k.startswith(prefix))

  def listing(self, folder: str) -> list[str]:
    return list(dict.fromkeys(k.partition("/")[0] for k in self._keys(folder)))

  def walk(self, folder: str) -> Iterator[str]:
    for key in self._keys(folder):
      if not any(map(is_temporary, key.split("/"))):
        yield key if folder == "." else f"{folder}/{key}"

  def leftovers(self) -> list[str]:
    return [
      key for key in self._keys(".") if any(map(is_temporary, key.split("/")))
    ]

  def write_all(self, values: Mapping[str, bytes]) -> None:
    written = [
      (key, self._store.write(self._full(key), values[key])) for key in values
    ]
    for key, future in written:
      try:
        future.result()
      except _ERRORS as error:
        raise self._failed(key, "written", error) from error

  def write_pieces(self, key: str, pieces: Iterable[bytes]) -> None:
    self.write_all({key: b"".join(pieces)})

  def swap(self, key: str, *, old: bytes | None, new: bytes | None) -> bool:
    if new is None and self.scheme == "s3":
      raise RepositoryError(
        f"{self.path(key)} was not removed: S3 cannot remove a ref on "
        "condition that nobody has moved it; remove the file by hand while "
        "nobody pushes"
      )
    self.prove()
    try:
      found = self._store.read(self._full(key)).result()
      if (bytes(found.value) if found.state == "value" else None) != old:
        return False
      written = self._store.write(
        self._full(key), new, if_equal=found.stamp.generation
      ).result()
      # A lost swap does not raise: it answers with an empty generation. So
      # does one that was won, if the answer was lost and the request repeated.
      return written.generation != b"" or self._read_or_none(key) == new
    except _ERRORS as error:
      raise self._failed(key, "written", error) from error

  def _read_or_none(self, key: str) -> bytes | None:
    found = self._store.read(self._full(key)).result()
    return bytes(found.value) if found.state == "value" else None

  def prove(self) -> None:
    if self._proven or _endpoint(self.scheme) is None:
      return
    key = f"{TEMPORARY}swap-{uuid.uuid4().hex}"
    try:
      absent = self._store.read(self._full(key)).result().stamp.generation
      # TensorStore looks before it writes. All look before the first writes.
      race = [
        self._store.write(self._full(key), str(number), if_equal=absent)
        for number in range(_CONTENDERS)
      ]
      won = sum(write.result().generation != b"" for write in race)
      self._store.write(self._full(key), None).result()
    except _ERRORS as error:
      raise self._failed(key, "written", error) from error
    if won != 1:
      raise RepositoryError(
        f"{self.root}: the endpoint {_endpoint(self.scheme)} let {won} of "
        f"{_CONTENDERS} writers create one key: it ignores conditions "
        "(If-None-Match, ifGenerationMatch), so two pushes could lose a "
        "commit; nothing was moved. Use a store with conditional writes"
      )
    self._proven = True

  def delete(self, key: str) -> None:
    keys = [key, *(f"{key}/{name}" for name in self._keys(key))]
    gone = [(name, self._store.write(self._full(name), None)) for name in keys]
    for name, future in gone:
      try:
        future.result()
      except _ERRORS as error:
        raise self._failed(name, "removed", error) from error

  def prune(self, key: str) -> None:
    del key  # a bucket has no folders

  def _failed(self, key: str, what: str, error: Exception) -> RepositoryError:
    # TensorStore adds the whole request in brackets.
    text = str(error).partition(" [")[0]
    hint = {
      "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and "
      "AWS_ENDPOINT_URL",
      "gs": "the bucket and `gcloud auth application-default login`",
    }.get(self.scheme, "the URL")
    return RepositoryError(
      f"{self.path(key)} could not be {what}: {text}; check {hint}, and try "
      "again: what was copied so far is kept"
    )


class _PastTheEnd(Exception):
  """Bytes were asked for that a value does not have."""


def _endpoint(scheme: str) -> str | None:
  """Returns the endpoint of one's own, if there is one."""
  if scheme == "s3":
    return _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
  return _environment("TENSORSTORE_GCS_HTTP_URL") if scheme == "gs" else None


def _environment(*names: str) -> str | None:
  found = (os.environ.get(name) for name in names)
  return next((value for value in found if value), None)
