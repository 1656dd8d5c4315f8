"""Errors that the user can fix: a program prints the message alone and exits with 2."""


class InputError(ValueError):
    """Input that cannot be used: the message names the value, the limit and the fix."""
