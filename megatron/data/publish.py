"""Files that appear whole or not at all."""

import os
import secrets
from pathlib import Path


class Partial:
    """A file being written beside its final place, under a name of its own.

    Attributes:
        path: where the file will be.
        file: open for writing, binary.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        self.file = self._written.open("wb")

    def close(self) -> None:
        """Make sure that everything is on disk."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def place(self) -> None:
        """Give the file its final name, replacing what was there."""
        os.replace(self._written, self.path)

    def discard(self) -> None:
        """Remove what was written; nothing happens if it is in place already."""
        self.file.close()
        self._written.unlink(missing_ok=True)


def publish(partials: list[Partial]) -> None:
    """Put `partials` in place together.

    The old index files go first and the new ones come last, so that a crash between two renames leaves a dataset that
    is visibly incomplete, never a mixture of an old and a new one.
    """
    for partial in partials:
        partial.close()
    indexes = [partial for partial in partials if partial.path.suffix == ".idx"]
    for partial in indexes:
        partial.path.unlink(missing_ok=True)
    for partial in partials:
        if partial not in indexes:
            partial.place()
    for partial in indexes:
        partial.place()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that appears whole or not at all, replacing what was there."""
    partial = Partial(path)
    try:
        partial.file.write(content)
        publish([partial])
    except BaseException:
        partial.discard()
        raise
