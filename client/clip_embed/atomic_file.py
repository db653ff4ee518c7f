"""Replaces a file atomically, by one process at a time.

Unfinished files are in the folder `NAME.parts` beside it, which is locked. If a process is killed, the next one that
writes NAME takes over the folder.
"""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clip_embed.table import UnusableOutput, parts_folder

_UNFINISHED = ".unfinished"


def is_special(path: Path) -> bool:
    """Whether the path is something other than a file: a device, a FIFO or a folder. It is written to directly."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def resolve_link(path: Path) -> Path:
    """The target of a link, whether it exists or not; other paths unchanged."""
    is_link = os.path.islink(path)  # noqa: PTH114  Path's raises for a folder above it that is closed
    return Path(os.path.realpath(path)) if is_link and not is_special(path) else path


@contextmanager
def lock_parts(path: Path) -> Iterator[Path]:
    """The folder of unfinished files, created if needed and locked for this process. The lock ends with the process.

    Raises:
        OSError: It cannot be created.
        UnusableOutput: Another process holds the lock.
    """
    folder = parts_folder(path)
    while True:
        folder.mkdir(exist_ok=True)
        with _opened(folder) as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnusableOutput(f"{folder} is in use by another clip-embed") from error
            if not folder.exists() or folder.stat().st_ino != os.fstat(opened).st_ino:
                continue  # the other process just finished and removed the folder
            try:
                yield folder
            finally:
                with suppress(OSError):
                    for unfinished in folder.glob(f"*{_UNFINISHED}"):  # left by a killed process
                        unfinished.unlink()
                    folder.rmdir()  # if it is empty
            return


@contextmanager
def replace_atomically(path: Path, folder: Path, *, like: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that replaces `path` once it is complete and on disk. After an exception it is removed.

    It gets the mode and owner of the old file, or of `like`. If that is not allowed, or if the old file has other hard
    links, the old file is overwritten instead, and a crash may leave it incomplete.

    Args:
        folder: where the file is until then, on the same file system.
    """
    old = _status(like or path)
    if old and not like and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    unfinished = folder / f"{path.name}{_UNFINISHED}"
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as file:
            is_alike = old is None or _copy_mode_and_owner(old, file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        if old is None or like or (is_alike and old.st_nlink == 1):
            unfinished.replace(path)
        else:
            with unfinished.open("rb") as file, path.open("wb") as target:
                shutil.copyfileobj(file, target)
                target.flush()
                os.fsync(target.fileno())
            unfinished.unlink()
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    with _opened(path.parent) as parent:
        os.fsync(parent)  # so that the new name survives a power failure


def _copy_mode_and_owner(old: os.stat_result, opened: int) -> bool:
    """Copy mode and owner to the new, still empty file. Returns whether that was allowed."""
    try:
        os.fchmod(opened, stat.S_IMODE(old.st_mode) & 0o700)
        os.fchown(opened, old.st_uid, old.st_gid)
        os.fchmod(opened, stat.S_IMODE(old.st_mode))  # a change of owner may clear bits
    except PermissionError:
        return False
    return True


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    opened = os.open(folder, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)
