"""Did you mean: the closest of the words that would have been right."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, options: Iterable[str]) -> str:
  """Returns a short question that names the closest option, or nothing.

  Args:
    word: what was given.
    options: what would have been right.

  Returns:
    `"did you mean 'x'?"`, or the empty string if nothing is close.

  Example:
    >>> did_you_mean("dense/kernle", ["dense/kernel", "dense/bias"])
    "did you mean 'dense/kernel'?"
  """
  close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
  return f"did you mean {close[0]!r}?" if close else ""


def list_names(names: Iterable[str], *, limit: int = 6) -> str:
  """Returns names in quotes, the first few of them if there are many.

  Args:
    names: what to list.
    limit: how many to spell out.

  Example:
    >>> list_names("abcd", limit=2)
    "'a', 'b' and 2 more"
  """
  names = [repr(name) for name in names]
  rest = len(names) - limit
  text = ", ".join(names[:limit]) or "none"
  return f"{text} and {rest} more" if rest > 0 else text
