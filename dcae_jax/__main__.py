"""`python -m dcae_jax`, and the command `dcae`: both are `dcae_jax.main`."""

from dcae_jax.runs import signals


def main() -> None:
  """Runs what the command line says."""
  signals.listen()  # before what takes time: the import below
  from dcae_jax import main

  main.start()


if __name__ == "__main__":
  main()
