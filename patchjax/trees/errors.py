"""Every exception of patchjax, in one place.

All derive from `PatchjaxError`, so that a program (the command line is one)
can turn any of them into a message. Each also derives from the built-in that
a JAX user would catch. A message says what is wrong and where, what was
expected and what was found, and how to mend it.
"""


class PatchjaxError(Exception):
  """Base class of all errors raised on purpose by patchjax."""

  def __str__(self) -> str:
    # KeyError prints the repr of its argument; a message is for a person.
    return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class StructureError(PatchjaxError, ValueError):
  """A tree that has no usable names: ambiguous, empty, or of a wrong kind."""


class MismatchError(PatchjaxError, ValueError):
  """Two trees that should fit each other do not; lists every bad leaf."""


class SelectionError(PatchjaxError, ValueError):
  """A selector matched nothing, too much, or is not a selector."""


class DtypeError(PatchjaxError, TypeError):
  """A dtype that cannot be held or computed with here."""


class NonFiniteError(PatchjaxError, ValueError):
  """NaN or Inf where numbers are needed; names the leaves."""


class LawError(PatchjaxError, ValueError):
  """A delta whose law does not allow what was asked of it."""


class FormatError(PatchjaxError, ValueError):
  """A file that is malformed, truncated, edited, or of an unknown version."""


class BaseMismatchError(PatchjaxError, ValueError):
  """A patch that was made for another base."""


class RepositoryError(PatchjaxError):
  """A repository that cannot do what was asked."""


class NotARepositoryError(RepositoryError):
  """A directory that holds no repository."""


class RefNotFoundError(RepositoryError, KeyError):
  """A branch, tag or commit id that does not exist, or is ambiguous."""


class ConflictError(RepositoryError):
  """Somebody else moved the ref in the meantime, or two changes collide."""


class IntegrityError(RepositoryError):
  """Stored bytes that are missing or are not what their digest says."""


class VetError(PatchjaxError, ValueError):
  """Evidence that cannot be used: missing tests, wrong sizes, not numbers."""


class ReleaseRefusedError(PatchjaxError):
  """A candidate that the evidence does not allow to be released."""
