"""The errors that are meant to be read by a user.

Commands print the message of a `UserError` as one line and exit with status 2, that of a `TryAgain` with `AGAIN`;
anything else is a bug and keeps its traceback.
"""

# Launchers start a command again that ends with this, and never after status 2. jax ends a process with it (SIGABRT)
# when another one has died.
AGAIN = 134


class UserError(Exception):
    """Bad input or configuration. The message names the file or field, the value, and what to do."""


class UnsupportedOption(UserError):
    """A valid option of the original models that this package does not offer (see tests/parity/unsupported.txt)."""


class TryAgain(Exception):
    """Nothing is wrong with what was asked for: the same command may do it another time. The message says what was."""
