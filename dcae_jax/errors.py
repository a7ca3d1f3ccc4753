"""What is wrong with the input, as opposed to the program."""


class UserError(ValueError):
  """A mistake that the user can put right; the message says how.

  The command line prints the message alone. Anything else that is raised is a
  bug, and has a traceback.
  """


def first_line(error: Exception) -> str:
  """Of the message of another package's error, which can be pages long."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
