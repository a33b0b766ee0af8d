"""What befalls files, for the tests of damage and its repair."""

import os


def flip(path, position, bit=0):
  """Flips a bit of a file."""
  with open(path, "r+b") as file:
    file.seek(position)
    octet = file.read(1)[0]
    file.seek(position)
    file.write(bytes([octet ^ (1 << bit)]))


def files_below(path):
  """The paths of all files below a folder, sorted."""
  return sorted(
    os.path.join(folder, name)
    for folder, _, names in os.walk(path)
    for name in names
  )
