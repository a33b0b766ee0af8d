"""The order in which things go: users before what they use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


def sweep(
  nodes: Mapping[str, Iterable[str]], remove: Callable[[str], bool]
) -> list[str]:
  """Removes things, users before what they use.

  At every moment whatever is left has all that it uses; what could not be
  removed keeps all that it uses too.

  Args:
    nodes: `{thing: what it uses}`; what is no thing itself does not matter.
    remove: removes one thing, and returns whether it is gone.

  Returns:
    What was removed, in order.

  Example:
    >>> sweep({"tree": [], "commit": ["tree"], "other": []}, lambda key: True)
    ['other', 'commit', 'tree']
  """
  uses = {
    key: {other for other in used if other in nodes and other != key}
    for key, used in nodes.items()
  }
  users = dict.fromkeys(nodes, 0)
  for used in uses.values():
    for key in used:
      users[key] += 1
  ready = [key for key, count in users.items() if not count]
  gone: dict[str, None] = {}  # in order
  used: set[str] = set()  # by what is in use again
  while ready:
    key = ready.pop()
    if not remove(key):
      used |= _below(key, uses)
      continue
    gone[key] = None
    for other in uses[key]:
      users[other] -= 1
      if not users[other]:
        ready.append(other)
  # What is left is in use, or payloads with bases in each other.
  for key in nodes:
    if key not in gone and key not in used:
      if remove(key):
        gone[key] = None
      else:
        used |= _below(key, uses)
  return list(gone)


def _below(key: str, uses: Mapping[str, Iterable[str]]) -> set[str]:
  """Returns a thing and all that it uses."""
  found, stack = {key}, [key]
  while stack:
    new = set(uses[stack.pop()]) - found
    found |= new
    stack += new
  return found
