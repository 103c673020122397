"""The one error that a user is shown."""


class FmsimError(Exception):
    """A mistake of the user or a bad input; the message names the file, the key and the fix."""
