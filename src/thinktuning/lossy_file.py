"""A file whose records a full disk may lose."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)


class LossyFile:
    """Takes records whole, or loses them: a disk without room ends no run.

    Args:
        path: Its folder must be there.
        of: What its records are called, in the plural.
        length: Bytes of whole records that are there; what is behind them is cut off.
    """

    def __init__(self, path: Path, of: str, length: int = 0) -> None:
        self.path = path
        self.length = length
        self._of = of
        self._lost = 0

    def append(self, records: list[bytes]) -> None:
        """Write these at once, all or none of them."""
        added = b"".join(records)
        try:
            with self.path.open("ab") as file:
                file.truncate(self.length)
                file.write(added)
        except OSError as error:
            if records and not self._lost:
                log.warning("%s of %s are lost (%s); training goes on", self._of, self.path, error)
            self._lost += len(records)
        else:
            self.length += len(added)

    def tell_lost(self) -> None:
        """Say how much is missing."""
        if self._lost:
            self.append([])  # the end may be half a record
            log.warning("%s lacks %d %s that couldn't be written", self.path, self._lost, self._of)
