"""What is wrong with the input, as opposed to the program."""


class UserError(ValueError):
  """A mistake that the user can put right; the message says how.

  The command line prints the message alone. Anything else that is raised is a
  bug, and has a traceback.
  """
