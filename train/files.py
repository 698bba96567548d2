"""Files and folders that are whole or not there, whenever a run is stopped, and that one process has to itself."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside `path` to write to; at the end it takes `path`'s place in one step, after an exception it goes.

    Its content reaches the disk before its name does, so that not even a power cut leaves half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, a folder to write into; what an earlier process left of a draft goes first."""
    draft, old = (path.with_name(f"{path.name}.{kind}") for kind in ("draft", "old"))
    for rest in (draft, old):
        shutil.rmtree(rest, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if path.exists():
            path.rename(old)
        draft.rename(path)
    finally:
        for rest in (draft, old):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def to_itself(path: Path) -> Iterator[bool]:
    """Whether no other process is in here with the same path; as long as this one is, none will be.

    A process that ends in any way leaves; its children, such as those that load data, do not count. Where the system
    or the disk knows no such locks, everybody is let in.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        alone = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            alone = error.errno not in (errno.EAGAIN, errno.EACCES)
        yield alone
