"""The eight tasks: five of the demo's, and three from Debian packages.

All are scored as the demo's are: a sentence describes each class, the base
turns it into a vector once and for all, and a text belongs to the nearest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

from experiments.merging import debian
from patchjax.demo import data
from patchjax.demo import tasks as demo

NAMES = (*demo.NAMES, "noun", "verb", "fortunes")

# The lexicographer files of WordNet 3.0 (`man lexnames`) with most synsets;
# all fifteen of the verbs. Their numbers stand in the second column of a
# synset.
_NOUNS = {
  "04": ("act", "an act or activity"),
  "05": ("animal", "an animal"),
  "06": ("artifact", "an object made by people"),
  "07": ("attribute", "a quality of people or things"),
  "08": ("body", "a part of the body"),
  "09": ("cognition", "an idea or a field of knowledge"),
  "10": ("communication", "a message, a text or speech"),
  "13": ("food", "food or drink"),
  "14": ("group", "a group or an organization"),
  "15": ("location", "a place or region"),
  "17": ("object", "a natural object"),
  "18": ("person", "a person"),
  "20": ("plant", "a plant"),
  "26": ("state", "a state or condition"),
  "27": ("substance", "a substance or material"),
}
_VERBS = {
  "29": ("body", "care for or use the body"),
  "30": ("change", "change or become different"),
  "31": ("cognition", "think, judge or know"),
  "32": ("communication", "say, ask or tell"),
  "33": ("competition", "fight or compete"),
  "34": ("consumption", "eat or drink"),
  "35": ("contact", "touch, hit or hold"),
  "36": ("creation", "make or create"),
  "37": ("emotion", "feel an emotion"),
  "38": ("motion", "move or travel"),
  "39": ("perception", "see, hear or feel"),
  "40": ("possession", "give, get or own"),
  "41": ("social", "act in society"),
  "42": ("stative", "be or have"),
  "43": ("weather", "rain, snow or shine"),
}
# Files of the fortunes with a subject of their own; grab bags are left out.
_FORTUNES = {
  "art": "art and artists",
  "computers": "computers",
  "definitions": "the definition of a word",
  "drugs": "drinking and drugs",
  "education": "school and education",
  "food": "food and cooking",
  "knghtbrd": "Debian developers chatting",
  "law": "law and lawyers",
  "linux": "Linux",
  "literature": "literature",
  "love": "love",
  "men-women": "men and women",
  "people": "famous people",
  "perl": "the Perl programming language",
  "platitudes": "platitudes",
  "politics": "politics",
  "riddles": "a riddle",
  "science": "science",
  "songs-poems": "a song or poem",
  "sports": "sports",
  "startrek": "Star Trek",
  "wisdom": "wisdom",
  "work": "work and business",
  "zippy": "Zippy the Pinhead",
}
_PROMPTS = {
  "noun": {k: f"This is the definition of {p}." for k, p in _NOUNS.values()},
  "verb": {k: f"This means to {p}." for k, p in _VERBS.values()},
  "fortunes": {k: f"This is about {p}." for k, p in _FORTUNES.items()},
}


def _lines(rows: Sequence[tuple[str, str]]) -> bytes:
  return "".join(f"{kind}\t{text}\n" for kind, text in rows).encode()


def _glosses(content: bytes, kinds: Mapping[str, tuple[str, str]]) -> bytes:
  """The class and the definition, without examples, of every synset."""
  rows = []
  for line in content.decode().split("\n")[:-1]:
    if line.startswith("  "):  # the licence
      continue
    synset, _, gloss = line.partition(" | ")
    kind = kinds.get(synset.split(" ", 2)[1])
    if kind is not None:
      rows.append((kind[0], " ".join(gloss.split('; "')[0].split())))
  return _lines(rows)


def read_wordnet(files: Mapping[str, bytes]) -> dict[str, bytes]:
  """Keeps classes and definitions of the nouns and verbs of WordNet."""
  return {
    "noun.tsv": _glosses(files["usr/share/wordnet/data.noun"], _NOUNS),
    "verb.tsv": _glosses(files["usr/share/wordnet/data.verb"], _VERBS),
  }


def _reader(name: str) -> Callable[[Mapping[str, bytes]], dict[str, bytes]]:
  """Keeps the fortunes of one package, with the names of their files."""

  def read(files: Mapping[str, bytes]) -> dict[str, bytes]:
    rows = []
    for kind in _FORTUNES:
      content = files.get(f"usr/share/games/fortunes/{kind}", b"")
      text = content.decode(errors="replace").replace("_\b", "")
      for fortune in text.split("\n%\n"):
        if words := fortune.replace("\n%", "").split():
          rows.append((kind, " ".join(words)))
    return {name: _lines(rows)}

  return read


# Princeton's licence: free to use and pass on, with its notice.
WORDNET = debian.Deb(
  name="wordnet-base",
  version="1:3.0-37",
  sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
  read=read_wordnet,
  files={
    "noun.tsv": (
      "d5c42e2fb11771f5dd819dfcf5d3915f28fd447b146d595a5ce5eab7b71122f3"
    ),
    "verb.tsv": (
      "96d856955b6121172f6acf0d2bc788c81ba0e7a75fb958d85f2193959495fcc4"
    ),
  },
  megabytes=6.5,
)
# The collection is under BSD's licence; quotations are their authors'.
FORTUNES = debian.Deb(
  name="fortunes",
  version="1:1.99.1-7.3",
  sha256="41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
  read=_reader("fortunes.tsv"),
  files={
    "fortunes.tsv": (
      "aa579279ac01f2d6ddb045438e9aa9a013ee1fdcaed90a786f43bb6a4b931afa"
    ),
  },
  megabytes=0.8,
)
FORTUNES_MIN = debian.Deb(
  name="fortunes-min",
  version="1:1.99.1-7.3",
  sha256="9eed5b45064e41133dae0967cf3a17588ad77c014fcc7bf1527fa3ea48e44d07",
  read=_reader("fortunes-min.tsv"),
  files={
    "fortunes-min.tsv": (
      "ed0ce2a9bd6ae0b3caf1e93bebd150e78f6c0a3e768d706a1cbb7cc507dcd6d2"
    ),
  },
  megabytes=0.1,
)
_DEBS = {
  "noun": (WORDNET,),
  "verb": (WORDNET,),
  "fortunes": (FORTUNES, FORTUNES_MIN),
}


def fetch(
  names: Sequence[str], echo: Callable[[str], object] = lambda line: None
) -> dict[str, pathlib.Path]:
  """Makes sure that the model and the texts of the tasks are in the cache.

  Args:
    names: of the tasks; the demo's are always fetched.
    echo: receives one line for every download.

  Returns:
    The path of every file, by name.
  """
  debs = {deb.name: deb for name in names for deb in _DEBS.get(name, ())}
  return data.fetch(echo=echo) | debian.fetch(list(debs.values()), echo=echo)


def rows(
  name: str, files: Mapping[str, pathlib.Path]
) -> list[tuple[str, str, str]]:
  """The (group, class, text) of every text of a Debian task.

  Args:
    name: "noun", "verb" or "fortunes".
    files: paths as `fetch` gives them.
  """
  found = []
  for path in (files[f"{name}.tsv"], files.get(f"{name}-min.tsv")):
    if path is not None:
      for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        kind, text = line.split("\t", 1)
        found.append((text.lower(), kind, text))
  return found


def load(
  names: Sequence[str],
  files: Mapping[str, pathlib.Path],
  *,
  tokens: int,
  most: Mapping[str, int],
) -> dict[str, demo.Task]:
  """Reads, splits and tokenizes the tasks.

  Args:
    names: which, of `NAMES`.
    files: paths as `fetch` gives them.
    tokens: longest text, in tokens.
    most: how many texts of a split are wanted at most, by its name.

  Returns:
    Task by name.

  Raises:
    ValueError: if there is no task of a name.
  """
  if unknown := set(names) - set(NAMES):
    raise ValueError(f"unknown tasks {sorted(unknown)}, known are {NAMES}")
  own = [name for name in names if name in demo.NAMES]
  found = demo.load(files, tokens=tokens, most=most, names=own)
  tokenizer = demo.tokenizer(files["tokenizer.json"], tokens)
  for name in names:
    if name in _PROMPTS:
      found[name] = demo.build(
        name, rows(name, files), tokenizer, most, prompts=_PROMPTS[name]
      )
  return {name: found[name] for name in names}
