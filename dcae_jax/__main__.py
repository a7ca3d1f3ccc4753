"""`python -m dcae_jax`, and the command `dcae`: both are `dcae_jax.main`."""

import os
import sys

from dcae_jax.runs import signals


def main() -> None:
  """Runs what the command line says."""
  signals.listen()  # before what takes time: the import below
  # `python -m` finds modules of the current directory, a command does not.
  sys.path.append(os.getcwd())
  from dcae_jax import main

  main.start()


if __name__ == "__main__":
  main()
