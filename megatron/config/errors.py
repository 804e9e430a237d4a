"""What is raised for a user's mistake."""


class UsageError(ValueError):
    """The options are wrong: the message names the flag and the way out. Entry scripts end with exit code 2."""
