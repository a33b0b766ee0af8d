"""Conflicts between contributors: structure, support, geometry, function."""

from patchjax.merging.conflict.comparing import conflicts
from patchjax.merging.conflict.findings import Finding
from patchjax.merging.conflict.report import ConflictReport, LeafConflict
