"""What the tests of remotes share: repositories, buckets, counted copies."""

import contextlib
import pathlib
import subprocess
import sys
import urllib.request

import numpy as np

from patchjax.history import Repo
from patchjax.history.storage.files import is_temporary

LARGE = (150, 200)  # 120 kB of noise: a payload of its own, and no blob

_S3 = """
import logging, sys, threading, time
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from moto.server import ThreadedMotoServer

real = DomainDispatcherApplication.__call__
lock = threading.Lock()

def call(self, environ, start_response):
  if environ["REQUEST_METHOD"] != "PUT":
    return real(self, environ, start_response)
  if "careless" in sys.argv:
    # A store that speaks S3, and ignores conditions.
    for name in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
      environ.pop(name, None)
    time.sleep(0.3)  # all who race have looked by now
    return real(self, environ, start_response)
  # S3 looks and writes in one step; moto lets another write in between.
  with lock:
    return real(self, environ, start_response)

DomainDispatcherApplication.__call__ = call
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


_GCS = """
import sys, threading
from http import HTTPStatus
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

lock = threading.Lock()

def generation(storage, bucket, name):
  try:
    return str(storage.get_file_obj(bucket, name)["generation"])
  except NotFound:
    return "0"

def conditional(real):
  # The emulator knows neither conditions nor empty values; the store does.
  def call(request, response, storage, *args, **kwargs):
    if request.query.get("uploadType") == ["media"] and request.data is None:
      request._data = b""
    wanted = request.query.get("ifGenerationMatch")
    bucket = request.params["bucket_name"]
    name = request.params.get("object_id") or request.query["name"][0]
    with lock:
      if wanted and wanted[0] != generation(storage, bucket, name):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
      return real(request, response, storage, *args, **kwargs)
  return call

def labelled(real):
  def call(request, response, storage, *args, **kwargs):
    names = (request.params[key] for key in ("bucket_name", "object_id"))
    response["x-goog-generation"] = generation(storage, *names)
    return real(request, response, storage, *args, **kwargs)
  return call

objects.delete = conditional(objects.delete)
objects.insert = conditional(objects.insert)
objects.download = labelled(objects.download)

from gcp_storage_emulator.server import create_server

server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
server.start()
print(server._api._httpd.socket.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _server(program, *options):
  process = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", program, *options],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  try:
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
  finally:
    process.stdin.close()
    process.stdout.close()
    process.kill()
    process.wait()


@contextlib.contextmanager
def s3_server(*options):
  """Yields the endpoint of a fake S3 with one bucket, on loopback."""
  with _server(_S3, *options) as endpoint:
    request = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
    urllib.request.urlopen(request).close()
    yield endpoint


def gcs_server():
  """Yields the endpoint of a fake Google storage with one bucket."""
  return _server(_GCS)


def value(seed=0, leaves=3):
  """Returns leaves of noise, and small ones."""
  rng = np.random.default_rng(seed)
  return {
    f"layer{i}": {
      "kernel": rng.standard_normal(LARGE).astype(np.float32),
      "bias": rng.standard_normal(4).astype(np.float32),
    }
    for i in range(leaves)
  }


def tuned(old, leaf, seed=1):
  """Returns a value of which one leaf has changed a little."""
  rng = np.random.default_rng(seed)
  noise = rng.standard_normal(LARGE).astype(np.float32)
  kernel = old[leaf]["kernel"] * (1 + np.float32(1e-3) * noise)
  return {**old, leaf: {**old[leaf], "kernel": kernel}}


def history(path, commits=4):
  """Returns a repository with chains of differences, a branch, a tag, a note.

  Besides main~2, `dev` has a commit of its own.
  """
  repo = Repo.init(path)
  x = value()
  repo.commit(x, message="step 0")
  for i in range(1, commits):
    x = tuned(x, f"layer{i % 2}", i)
    repo.commit(x, message=f"step {i}")
  repo.branch("dev", "main~2")
  repo.commit(tuned(x, "layer2", 99), message="try", branch="dev")
  repo.tag("v1", "main~1")
  repo.annotate("main", "verdict", {"accepted": True})
  return repo


def same(a, b, ref="main", there=None):
  """Whether two repositories have one value at a ref, to the bit."""
  return a.show(ref).id == b.show(there or ref).id and equal(
    a.checkout(ref), b.checkout(there or ref)
  )


def equal(a, b):
  """Whether two nested dicts hold the same bits."""
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
  return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def bytes_of(repo):
  """Returns the bytes of the whole immutable files of a local repository."""
  return sum(
    path.stat().st_size
    for folder in ("objects", "payloads", "blobs")
    for path in pathlib.Path(repo.path, folder).rglob("*")
    if path.is_file() and not is_temporary(path.name)
  )
