"""`python -m patchjax.cli`, where the console script is not on the path."""

from patchjax.cli import main

if __name__ == "__main__":
  main()
