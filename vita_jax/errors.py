"""The two errors that are meant to be read by a user.

Commands print the message of a `UserError` as one line and exit with status 2; anything else is a bug and keeps its
traceback.
"""


class UserError(Exception):
    """Bad input or configuration. The message names the file or field, the value, and what to do."""


class UnsupportedOption(UserError):
    """A valid option of the original models that this package does not offer (see tests/parity/unsupported.txt)."""
