"""One process at a time in a folder, by a lock of the operating system on a file there, which ends with its process.

flock(2) on POSIX and LockFile on Windows; the file says who holds it, and stays when nobody does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path
from typing import ClassVar

from penchant.client._keys import refused
from penchant.common.errors import InvalidConfig, StoreLocked

LOCK = "store.lock"


class FolderLock:
    """Holds a folder for this process, as long as it lives; a forked child does not hold it."""

    _held: ClassVar[weakref.WeakSet[FolderLock]] = weakref.WeakSet()

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise refused(path, error) from None
        try:
            _lock(self._handle)
        except BlockingIOError:
            pid = os.read(self._handle, 20).decode("ascii", "replace").strip()
            os.close(self._handle)
            if pid == str(os.getpid()):
                raise StoreLocked(f"this process has {folder} open already: share that store") from None
            raise StoreLocked(f"process {pid or 'unknown'} has {folder} open: close it there, or wait") from None
        except OSError as error:
            os.close(self._handle)
            raise InvalidConfig(f"{folder} cannot be locked: {error.strerror}; take a local disk") from None
        with contextlib.suppress(OSError):  # who holds it is only said, so a full disk stops nothing
            os.ftruncate(self._handle, 0)
            os.write(self._handle, str(os.getpid()).encode())
        self._held.add(self)

    def release(self) -> None:
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            self.drop()

    def drop(self) -> None:
        """Closes the file: the end of the lock, in a forked child only of its share in it."""
        handle, self._handle = self._handle, -1
        os.close(handle)
        self._held.discard(self)

    @classmethod
    def forked(cls) -> None:
        for lock in list(cls._held):
            lock.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FolderLock.forked)


def _lock(handle: int) -> None:
    """Takes the lock or raises BlockingIOError at once."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # far from the number of the process, which others read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
