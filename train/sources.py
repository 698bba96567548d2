"""Where does text come from? Files, compressed or not, or Hugging Face data sets, read a piece at a time."""

import hashlib
import io
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from train.errors import UserError

NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
RECORDS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".zst")
PIECE = 2**16  # characters of a text file that are read together

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """The documents of files, or of the data set that `datasets.load_dataset` gives for these arguments."""

    paths: tuple[str, ...] | None
    dataset: dict[str, Any] | None
    field: str
    id_field: str | None

    def __str__(self) -> str:
        if self.dataset is not None:
            return f"data.dataset: {self.dataset['path']}"
        return f"data.paths: {'the standard library' if self.paths is None else ', '.join(self.paths)}"

    @cached_property
    def files(self) -> dict[Path, str]:
        """The files that are on this machine and the names of their documents, in the order of the names.

        Raises:
            UserError: a path does not exist, or has no file.
        """
        if self.dataset is not None:
            folder = Path(self.dataset["path"])
            found = {path: str(path) for path in folder.rglob("*") if path.is_file()}
        elif self.paths is None:
            root = Path(sysconfig.get_path("stdlib"))
            names = {path: path.relative_to(root) for path in root.rglob("*.py")}
            found = {path: name.as_posix() for path, name in names.items() if not NOT_SOURCE.intersection(name.parts)}
        else:
            found = {}
            for given in sorted(map(Path, self.paths), key=Path.resolve):  # a file's outermost folder names it
                found = {path.resolve(): name for path, name in files_at(given).items()} | found
        return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))

    @property
    def fingerprint(self) -> str:
        """Another one for other options, and for files of another name, size or time of change."""
        stats = [(str(path), name, path.stat()) for path, name in self.files.items()]
        files = [(path, name, stat.st_size, stat.st_mtime_ns) for path, name, stat in stats]
        return hashlib.sha256(repr((asdict(self), files)).encode(errors="surrogateescape")).hexdigest()

    def rows(self) -> Iterator[Row]:
        """Pieces of documents: name, text, and whether the document ends there.

        What is empty or holds a NUL is left out, and of folders what is not UTF-8.

        Raises:
            UserError: a file or data set cannot be read, a record lacks a field, or there is no text.
        """
        row = None
        for row in self._rows():
            yield row
        if row is None:
            raise UserError(f"{self}: there is no document with UTF-8 text")

    def _rows(self) -> Iterator[Row]:
        if self.dataset is not None:
            yield from self._records(self.dataset)
            return
        given = {Path(path).resolve() for path in self.paths or ()}
        for path, name in self.files.items():
            if kind := RECORDS.get(Path(uncompressed(path.name)).suffix):
                yield from self._records({"path": kind, "data_files": str(path)}, f"{name}/")
            else:
                yield from text_rows(path, printable(name), must_be_text=path in given)

    def _records(self, options: dict[str, Any], prefix: str = "") -> Iterator[Row]:
        where = options.get("data_files", options["path"])
        try:
            for number, record in enumerate(load(options), 1):
                for option, field in (("data.field", self.field), ("data.id_field", self.id_field)):
                    if field is not None and field not in record:
                        raise UserError(f"{option}: {where} has no {field!r}, but {', '.join(map(repr, record))}")
                text = record[self.field]
                if not isinstance(text, str | None):
                    raise UserError(f"data.field: {self.field!r} must be text, {where} has {type(text).__name__} there")
                if text and "\0" not in text:
                    name = f"{prefix}{number}" if self.id_field is None else str(record[self.id_field])
                    yield {"name": printable(name), "text": printable(text), "last": True}
        except UserError:
            raise
        except Exception as error:  # datasets has no type of its own for what cannot be read
            raise UserError(f"{str(self).partition(':')[0]}: {where} cannot be read: {error}") from error


def load(options: dict[str, Any]) -> Any:
    """The records of a data set, streamed unless its options say otherwise; of a folder that datasets saved, too."""
    options = {"split": "train", "streaming": True} | options
    folder = Path(options["path"])
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))[options["split"]]
    return datasets.load_dataset(**options)


def files_at(given: Path) -> dict[Path, str]:
    """A file, all below a folder, or all that match a pattern with *, and their names; hidden ones only if named.

    A name is relative to the folder, or to the pattern's part before its first *.
    """
    folder = next(path for path in (given, *given.parents) if "*" not in str(path))
    if given.is_file():
        found = {given: given.resolve().name}
    elif folder.is_dir():
        pattern = "**/*" if folder == given else str(given.relative_to(folder))
        names = {path: path.relative_to(folder) for path in folder.glob(pattern) if path.is_file()}
        found = {path: name.as_posix() for path, name in names.items() if not any(p[0] == "." for p in name.parts)}
    else:
        raise UserError(f"data.paths: there is no file or folder {str(given)!r}")
    if not found:
        raise UserError(f"data.paths: there is no file in {str(given)!r}")
    return {path: uncompressed(name) for path, name in found.items()}


def uncompressed(name: str) -> str:
    return name.rpartition(".")[0] if name.endswith(COMPRESSED) else name


def printable(text: str) -> str:
    """Without halves of UTF-16's pairs, which JSON and names of files can hold."""
    return text.encode("utf-8", "replace").decode()


def text_rows(path: Path, name: str, must_be_text: bool) -> Iterator[Row]:
    """A text file in pieces; nothing if it is empty, or no text and need not be.

    Raises:
        UserError: it cannot be read, or must be text and is none.
    """
    try:
        if any("\0" in piece for piece in pieces(path)):  # or damaged at its end: read it whole before any of it counts
            raise ValueError("it holds a NUL")
        before = None
        for piece in pieces(path):
            if before is not None:
                yield {"name": name, "text": before, "last": False}
            before = piece
        if before is not None:
            yield {"name": name, "text": before, "last": True}
    except OSError as error:
        raise UserError(f"data.paths: {path} cannot be read: {error}") from error
    except ValueError as error:
        if must_be_text:
            raise UserError(f"data.paths: {path} is no text in UTF-8: {error}") from error


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, decompressed, in pieces that end where a line does if one ends there."""
    rest = ""
    with pa.input_stream(os.fspath(path)) as stream:
        file = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8", newline="")  # type: ignore[arg-type]
        while block := file.read(PIECE):
            block = rest + block
            end = block.rfind("\n") + 1 or len(block)
            yield block[:end]
            rest = block[end:]
    if rest:
        yield rest
