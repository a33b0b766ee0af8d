"""Golden drawings, and every drawing read back into the graph it shows."""

import textwrap

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from patchjax.history import Repo
from patchjax.history.commits import drawing
from patchjax.history.commits.listing import Listing
from tests.history import graphs


def draw(parents, lines=1):
  picture = drawing.Drawing()
  return [
    row
    for name, before in parents.items()
    for row in picture.rows(name, before, [name, *["~"] * (lines - 1)])
  ]


GOLDEN = {
  "line": ("c:b b:a a:", "* c\n* b\n* a"),
  "branch": ("d:a c:b b:a a:", "* d\n| * c\n| * b\n|/\n* a"),
  "merge": ("m:ab b:r a:r r:", "* m\n|\\\n| * b\n* | a\n|/\n* r"),
  "unrelated": ("a: b: c:d d:", "* a\n  * b\n* c\n* d"),
  "root inside": ("m:ab b: a:r r:", "* m\n|\\\n| * b\n* a\n* r"),
  "octopus": (
    "m:abc c:r b:r a:r r:",
    r"""
    * m
    |\
    | |\
    | | * c
    | * | b
    * | | a
    | |/
    |/
    * r
    """,
  ),
  "criss-cross": (
    "x:ab y:ba b:r a:r r:",
    r"""
    * x
    |\
    | | * y
    | | |\
    | |/  |
    | *   | b
    | |  /
    | |/
    |/|
    * | a
    |/
    * r
    """,
  ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
  spelled, expected = GOLDEN[name]
  parents = dict(part.split(":") for part in spelled.split())
  expected = textwrap.dedent(expected).strip("\n")
  assert "\n".join(draw(parents)) == expected


def test_long_texts_stand_beside_the_lines():
  rows = draw({"m": "ab", "b": "r", "a": "r", "r": ""}, lines=3)
  assert rows[:6] == ["*   m", "|\\  ~", "| | ~", "| * b", "| | ~", "| | ~"]
  assert rows[-4:] == ["|/", "* r", "  ~", "  ~"]


def read_back(rows):
  """Follows the lines of a drawing with the eyes: straight on if possible."""
  names = {i: row.split()[-1] for i, row in enumerate(rows) if "*" in row}
  rows = [row.rstrip("~" + "".join(names.values())) for row in rows]
  height, width = len(rows), max(map(len, rows)) + 4
  rows = [row.ljust(width) for row in rows]

  def below(i, at):
    return rows[i + 1][at] if i + 1 < height and at >= 0 else " "

  def ends(i, at, sign):
    """Yields the rows of the commits to which a line leads."""
    if sign == "\\" and below(i, at + 1) == "\\":
      yield from ends(i + 1, at + 2, "\\")
      if rows[i][at] == "|" or below(i, at) == " ":
        return  # it crossed a lane, or nothing begins here
    elif sign == "/" and below(i, at - 1) == "/":
      yield from ends(i + 1, at - 2, "/")
      return
    if below(i, at) == "*":
      yield i + 1
    elif below(i, at) == "|":
      yield from ends(i + 1, at, "|")
    elif below(i, at - 1) == "/":
      yield from ends(i + 1, at - 2, "/")

  found = {}
  for i, name in names.items():
    at = rows[i].index("*")
    lines = list(ends(i, at, "|"))
    if below(i, at + 1) == "\\":
      lines += ends(i + 1, at + 2, "\\")
    found[name] = sorted(names[row] for row in lines)
  return found


@given(graphs.dags(most=14), st.integers(1, 3))
@example(({"0": [], "1": [], "2": []}, {}), 1)
def test_every_edge_is_drawn_and_no_other(dag, lines):
  parents, times = dag
  with Repo.temporary() as repo:
    ids = graphs.build(repo, parents, times=times)
    names = {commit: f"c{name}" for name, commit in ids.items()}
    order = {
      names[commit.id]: [names[p] for p in commit.parents]
      for commit in Listing(repo, list(ids.values()))
    }
  assert len(order) == len(parents)
  found = read_back(draw(order, lines))
  assert found == {name: sorted(before) for name, before in order.items()}


def test_a_filtered_history_is_drawn_without_what_is_passed_over():
  parents = {"r": [], "a": ["r"], "b": ["r"], "a2": ["a"], "m": ["a2", "b"]}
  leaves = {
    "r": {"x": "0", "y": "0"},
    "a": {"x": "1", "y": "0"},
    "b": {"x": "2", "y": "0"},
    "a2": {"x": "1", "y": "1"},
    "m": {"x": "3", "y": "1"},
  }
  with Repo.temporary() as repo:
    ids = graphs.build(repo, parents, leaves)
    listing = Listing(repo, [ids["m"]], "x")
    shown = {commit.message: commit for commit in listing}
    assert list(shown) == ["m", "b", "a", "r"]
    names = {commit: name for name, commit in ids.items()}
    links = {
      name: [names[p] for p in listing.parents(commit)]
      for name, commit in shown.items()
    }
  assert links == {"m": ["a", "b"], "b": ["r"], "a": ["r"], "r": []}
