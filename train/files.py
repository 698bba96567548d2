"""Files and folders that are whole or not there, whenever a run is stopped."""

import os
import shutil
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
