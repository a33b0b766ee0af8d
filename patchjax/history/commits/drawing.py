r"""A history as a drawing: lanes of text, a commit a row, every edge a line.

Each line waits in a lane of its own for the commit it leads to, and no lane
ever moves. A commit is drawn in the leftmost of the lanes that wait for it;
the others come to it along one diagonal from the right, and the lines to its
further parents leave it along one diagonal to the right. Where a diagonal
crosses a lane, both go straight on.

    *   Merge left, right into main
    |\
    | |\
    | | * right
    | * | left
    * | | fix
    | |/
    |/
    * start
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

NODE = "*"


class Drawing:
  r"""Draws commits that come one by one, children before parents.

  Example:
    >>> drawing = Drawing()
    >>> commits = {"m": "ab", "b": "r", "a": "r", "r": ""}
    >>> for name, parents in commits.items():
    ...   for line in drawing.rows(name, parents, [name]):
    ...     print(line)
    * m
    |\
    | * b
    * | a
    |/
    * r
  """

  def __init__(self):
    # What each lane waits for; None for a lane that is free.
    self._lanes: list[str | None] = []
    self._ended: int | None = None  # the lane of a line that ended just now

  def rows(
    self, name: str, parents: Iterable[str], text: Sequence[str] = ("",)
  ) -> Iterator[str]:
    """Yields the lines of one commit.

    Args:
      name: its id.
      parents: ids of its parents, in order.
      text: what is said of it: the first line beside its node, the others
        beside what follows.
    """
    yield from self._arriving(name)
    lane = self._place(name)
    nodes = ["|" if at else " " for at in self._lanes]
    nodes[lane] = NODE
    known = list(parents)
    self._lanes[lane] = known[0] if known else None
    self._ended = None if known else lane
    edges = list(self._leaving(lane, known[1:]))
    edges += [self._standing()] * (len(text) - 1 - len(edges))
    rows = [" ".join(nodes), *edges]
    width = max(len(row.rstrip()) for row in rows)
    beside = [*text, *[""] * (len(rows) - len(text))]
    for row, words in zip(rows, beside, strict=True):
      # Only rows with words are filled up, all of a commit to one width.
      filled = row.rstrip().ljust(width if len(text) > 1 else 0)
      yield f"{filled} {words}".rstrip()

  def _place(self, name: str) -> int:
    """The lane of a commit; a free one, if none waits for it."""
    lanes = self._lanes
    if name in lanes:
      return lanes.index(name)
    # Right below the end of another history it would look like its next one.
    lane = 0
    while lane == self._ended or (lane < len(lanes) and lanes[lane]):
      lane += 1
    lanes += [None] * (lane + 1 - len(lanes))
    lanes[lane] = name
    return lane

  def _arriving(self, name: str) -> Iterator[str]:
    """Lanes that wait for a commit come to the leftmost of them."""
    lanes = self._lanes
    waiting = [lane for lane, at in enumerate(lanes) if at == name]
    if len(waiting) < 2:
      return
    last = waiting[-1]
    for lane in range(last, waiting[0], -1):
      if lanes[lane] == name:
        lanes[lane] = None  # this one turns into the diagonal
      yield self._standing({2 * lane - 1: "/"})
    self._trim()

  def _leaving(self, lane: int, parents: Sequence[str]) -> Iterator[str]:
    """Lines to further parents go to free lanes on the right."""
    lanes = self._lanes
    free = [i for i in range(lane + 1, len(lanes)) if lanes[i] is None] + list(
      range(len(lanes), len(lanes) + len(parents))
    )
    targets = dict(zip(free, parents, strict=False))
    for at in range(lane, max(targets, default=lane)):
      yield self._standing({2 * at + 1: "\\"})
      if at + 1 in targets:
        lanes += [None] * (at + 2 - len(lanes))
        lanes[at + 1] = targets[at + 1]
    self._trim()

  def _standing(self, others: dict[int, str] | None = None) -> str:
    """A row in which lanes go straight on, and some other signs."""
    signs = {2 * i: "|" for i, at in enumerate(self._lanes) if at}
    signs |= others or {}
    return "".join(signs.get(i, " ") for i in range(max(signs, default=-1) + 1))

  def _trim(self) -> None:
    while self._lanes and self._lanes[-1] is None:
      self._lanes.pop()
