"""Reading tars that others wrote: where a header is damaged there is an error, not the end of the archive.

`tarfile` alone takes any header that it cannot read, behind the first one, for the end: everything after it would be
left out without a word.
"""

from __future__ import annotations

import tarfile
from typing import Any


class StrictInfo(tarfile.TarInfo):
    """For `tarfile.open(..., tarinfo=StrictInfo)`: reading on raises `tarfile.ReadError` at a damaged header."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> StrictInfo:  # called with the keyword by no one, named as in the base class
        return _strictly(super().fromtarfile, tarfile)


def _strictly(read: Any, archive: tarfile.TarFile) -> Any:
    try:
        return read(archive)
    except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # an end as it should be
        raise
    except tarfile.HeaderError as e:
        if not archive.offset:
            raise  # no tar at all, which tarfile says itself
        raise tarfile.ReadError(f"damaged header at byte {archive.offset}: {e}") from e
