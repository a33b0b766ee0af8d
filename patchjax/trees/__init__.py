"""What a leaf is called: names, selection, renaming, compatibility, digests.

The modules are imported on first use: errors, names' text form and reports
are wanted by commands that must start without jax.
"""

from typing import TYPE_CHECKING

from patchjax.trees.lazy import attach

if TYPE_CHECKING:
  from patchjax.trees.check import check_compatible as check_compatible
  from patchjax.trees.digest import Entry as Entry
  from patchjax.trees.digest import canonical_json as canonical_json
  from patchjax.trees.digest import leaf_digest as leaf_digest
  from patchjax.trees.digest import tree_id as tree_id
  from patchjax.trees.digest import tree_objects as tree_objects
  from patchjax.trees.dtypes import dtype_name as dtype_name
  from patchjax.trees.errors import PatchjaxError as PatchjaxError
  from patchjax.trees.names import flatten as flatten
  from patchjax.trees.names import join as join
  from patchjax.trees.names import named_leaves as named_leaves
  from patchjax.trees.names import nested as nested
  from patchjax.trees.names import split as split
  from patchjax.trees.renaming import rename as rename
  from patchjax.trees.report import table as table
  from patchjax.trees.selectors import select as select

__getattr__, __dir__ = attach(
  __name__,
  {
    "check": "check_compatible",
    "digest": "Entry canonical_json leaf_digest tree_id tree_objects",
    "dtypes": "dtype_name",
    "errors": "PatchjaxError",
    "names": "flatten join named_leaves nested split",
    "renaming": "rename",
    "report": "table",
    "selectors": "select",
  },
)
