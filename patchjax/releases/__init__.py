"""Releases: versions that are computed, and refused without evidence."""

from patchjax.releases.release import Release, release, releases
from patchjax.releases.versions import (
  Decision,
  Interface,
  bump,
  classify,
  parse,
)
