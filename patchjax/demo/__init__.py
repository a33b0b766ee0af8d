"""The CLAMP story on a real model, for `patchjax demo`.

`run` plays it and writes a repository; `suite` is the suite of that
repository, for `patchjax vet --suite patchjax.demo:suite`; `policy` and
`compression_policy` are what its maintainers ask of a candidate.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from patchjax.demo.config import Config as Config
  from patchjax.demo.report import Report as Report
  from patchjax.demo.running import compression_policy as compression_policy
  from patchjax.demo.running import policy as policy
  from patchjax.demo.running import run as run
  from patchjax.demo.running import suite as suite

_HOME = {"Config": "config", "Report": "report", "run": "running"}
_HOME |= dict.fromkeys(("suite", "policy", "compression_policy"), "running")


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_HOME[name]}")
  value = globals()[name] = getattr(module, name)
  return value


def __dir__() -> list[str]:
  return sorted(_HOME)
