"""The CLAMP story on a real model, for `patchjax demo`.

`run` plays it and writes a repository; `suite` is the suite of that
repository, for `patchjax vet --suite patchjax.demo:suite`; `policy` and
`compression_policy` are what its maintainers ask of a candidate.
"""

from typing import TYPE_CHECKING

from patchjax.trees.lazy import attach

if TYPE_CHECKING:
  from patchjax.demo.config import Config as Config
  from patchjax.demo.report import Report as Report
  from patchjax.demo.running import compression_policy as compression_policy
  from patchjax.demo.running import policy as policy
  from patchjax.demo.running import run as run
  from patchjax.demo.running import suite as suite

__getattr__, __dir__ = attach(
  __name__,
  {
    "config": "Config",
    "report": "Report",
    "running": "compression_policy policy run suite",
  },
)
