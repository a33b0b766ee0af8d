"""Vetting: may this candidate replace that release?

A `Suite` of `Test`s gives per-example `Outcomes`; `gate` compares those of two
models under a `Policy` and returns a `Verdict`; `plan` says beforehand how many
examples that takes. Nothing here needs jax: outcomes are numpy arrays.
"""

from patchjax.vetting.gating import gate
from patchjax.vetting.ledger import record, uses
from patchjax.vetting.outcomes import Outcomes
from patchjax.vetting.planning import plan, smallest
from patchjax.vetting.policy import Policy
from patchjax.vetting.suite import Suite, Test
from patchjax.vetting.verdict import Row, Verdict
