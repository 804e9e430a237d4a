"""What is raised for a user's mistake, and for faults of a run of several ranks."""


class UsageError(ValueError):
    """The options are wrong: the message names the flag and the way out. Entry scripts end with exit code 2."""


class CommonError(ValueError):
    """A fault that every rank finds alike, so that one of them tells it for all."""


class PeerError(RuntimeError):
    """Other ranks ended, or do not answer. The fault is theirs, so they speak first."""
