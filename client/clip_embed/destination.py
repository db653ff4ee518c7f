"""How a file is written whole or not at all, by one process, in place of what has its name.

What is not finished is in the folder `NAME.parts` beside it, which is locked. A process that is killed leaves it to the
next one that writes NAME.
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

from clip_embed.table import UnusableOutput, parts_of

_UNFINISHED = ".unfinished"


def is_special(path: Path) -> bool:
    """Whether there is something that is no file: a device, a FIFO, a folder. It is written to as it is."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def through_links(path: Path) -> Path:
    """The file that a link leads to, whether it is there or not."""
    is_link = os.path.islink(path)  # noqa: PTH114  Path's raises for a folder above it that is closed
    return Path(os.path.realpath(path)) if is_link and not is_special(path) else path


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """The folder of what is not finished, made if need be, for this process alone; the lock ends with the process.

    Raises:
        OSError: It cannot be made.
        UnusableOutput: Another process has it.
    """
    folder = parts_of(path)
    while True:
        folder.mkdir(exist_ok=True)
        with _opened(folder) as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnusableOutput(f"{folder} is in use by another clip-embed") from error
            if not folder.exists() or folder.stat().st_ino != os.fstat(opened).st_ino:
                continue  # the other one was just finished, and took the folder along
            try:
                yield folder
            finally:
                with suppress(OSError):
                    for unfinished in folder.glob(f"*{_UNFINISHED}"):  # of a process that was killed
                        unfinished.unlink()
                    folder.rmdir()  # if there is nothing in it
            return


@contextmanager
def whole(path: Path, folder: Path, *, like: Path | None = None) -> Iterator[IO[bytes]]:
    """A file that takes the path's place when it is whole and on the disk; after an exception it is gone.

    It gets the mode and the owner of what was there, or of `like`. Where that cannot be, and where the old file has
    other names, the old one's content is replaced instead, which a crash may leave half done.

    Args:
        folder: where it is until then, on the same file system.
    """
    old = _status(like or path)
    if old and not like and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    unfinished = folder / f"{path.name}{_UNFINISHED}"
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as file:
            is_alike = old is None or _made_like(old, file.fileno())
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
        os.fsync(parent)  # so that the new name outlives a loss of power


def _made_like(old: os.stat_result, opened: int) -> bool:
    """Before anything is in it that others may not read."""
    try:
        os.fchmod(opened, stat.S_IMODE(old.st_mode) & 0o700)
        os.fchown(opened, old.st_uid, old.st_gid)
        os.fchmod(opened, stat.S_IMODE(old.st_mode))  # a change of owner may take away bits
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
