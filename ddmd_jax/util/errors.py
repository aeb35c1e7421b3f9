"""The errors that a command puts in one line."""


class UserError(Exception):
    """Its message is one line: what is wrong, where, and how to mend it."""
