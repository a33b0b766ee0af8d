"""Histories of any shape, made of commit objects alone.

Their leaves are stored nowhere: what lists, draws and searches histories does
not read them.
"""

import datetime

from hypothesis import strategies as st

from patchjax.history.storage import layout
from patchjax.history.storage.objects import commit_bytes, id_of
from patchjax.history.storage.refs import HEADS
from patchjax.trees.digest import Entry, tree_objects


def leaf(text):
  """Returns an entry that differs where the text does."""
  return Entry(id_of(text.encode()), "float32", (3,))


def build(repo, parents, leaves=None, times=None):
  """Stores commits and returns `{name: id}`.

  Args:
    repo: the repository.
    parents: `{name: names of its parents}`, parents first.
    leaves: `{name: {leaf: text}}`; by default one leaf with the name.
    times: `{name: seconds}`; by default a second more than the one before.
  """
  ids, objects, positions = {}, {}, {}
  for number, (name, before) in enumerate(parents.items()):
    values = (leaves or {}).get(name, {"w": name})
    tree, folders = tree_objects({k: leaf(v) for k, v in values.items()})
    time = layout.spell_time(float((times or {}).get(name, number)))
    latest = max((positions[p] for p in before), default="")
    order = None
    if time <= latest:
      after = datetime.datetime.fromisoformat(latest)
      order = layout.spell_time(after + datetime.timedelta(microseconds=1))
    data = commit_bytes(
      tree=tree,
      parents=tuple(ids[p] for p in before),
      message=name,
      author="Ada",
      time=time,
      recipe=None,
      patch=None,
      order=order,
    )
    ids[name], positions[name] = id_of(data), order or time
    objects |= {**folders, ids[name]: data}
  repo.objects.write_all(objects)
  return ids


def point(repo, branch, commit):
  """Puts a branch at a commit."""
  old = repo.refs.get(HEADS, branch)
  repo.refs.move(HEADS, branch, old=old, new=commit)


@st.composite
def dags(draw, most=12, roots=2, arity=4):
  """Histories: `{name: parents}`, and a time for each, of any clock."""
  count = draw(st.integers(1, most))
  parents = {}
  for i in range(count):
    least = 0 if i == 0 or (i < roots and draw(st.booleans())) else 1
    known = [str(j) for j in range(i)]
    chosen = st.lists(
      st.sampled_from(known), min_size=least, max_size=arity, unique=True
    )
    parents[str(i)] = draw(chosen) if known and least else []
  times = {name: draw(st.integers(0, 20)) for name in parents}
  return parents, times


def reachable(parents, tips):
  """Returns the names of commits and of all before them, the slow way."""
  seen, stack = set(), list(tips)
  while stack:
    name = stack.pop()
    if name not in seen:
      seen.add(name)
      stack += parents[name]
  return seen
