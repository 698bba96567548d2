"""Where does text come from? Files, compressed or not, or Hugging Face data sets, read a piece at a time."""

import hashlib
import io
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from train.errors import UserError

NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
RECORDS = {".jsonl", ".ndjson", ".parquet"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
PIECE = 2**16  # characters of a text file that are read together
BATCH = 128  # records of a Parquet file that are read together

Row = dict[str, Any]
Records = Iterable[tuple[str, Any]]  # records, each after where it stands
NoText = tuple[str, Any]  # what is left out: "files" or "records", and which


@dataclass(frozen=True)
class Source:
    """The documents of files, or of the data set that `datasets.load_dataset` gives for these arguments."""

    paths: tuple[str, ...] | None
    dataset: dict[str, Any] | None
    field: str
    id_field: str | None

    def __str__(self) -> str:
        paths = ["the standard library"] if self.paths is None else self.paths
        return f"{self.option}: {', '.join(paths) if self.dataset is None else self.dataset['path']}"

    @property
    def option(self) -> str:
        return "data.paths" if self.dataset is None else "data.dataset"

    @cached_property
    def files(self) -> dict[Path, str]:
        """The files that are on this machine and the names of their documents, in the order of the names.

        Raises:
            UserError: a path does not exist, cannot be read, or has no file.
        """
        if self.dataset is not None:
            folder = Path(self.dataset["path"])
            found = {path: str(path) for path in folder.rglob("*") if path.is_file()}
        elif self.paths is None:
            root = Path(sysconfig.get_path("stdlib"))
            names = {path: path.relative_to(root) for path in root.rglob("*.py")}
            found = {path: name.as_posix() for path, name in names.items() if not NOT_SOURCE.intersection(name.parts)}
        else:
            once: dict[str, tuple[Path, str]] = {}
            try:
                paths = sorted((os.path.realpath(given), given.is_symlink(), given) for given in map(Path, self.paths))
                for *_, given in paths:
                    for real, path, name in files_at(given):  # a file's outermost folder names it
                        once.setdefault(real, (path, uncompressed(name.as_posix())))
            except OSError as error:
                raise UserError(f"data.paths: {error.filename} cannot be read: {error.strerror}") from error
            found = dict(once.values())
        return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))

    @property
    def fingerprint(self) -> str:
        """Another one for other options, other code here, and files of another name, size or time of change."""
        stats = [(os.path.realpath(path), name, path.stat()) for path, name in self.files.items() if path.exists()]
        files = [(path, name, stat.st_size, stat.st_mtime_ns) for path, name, stat in stats]
        made_of = repr((asdict(self), files)).encode(errors="surrogateescape")
        return hashlib.sha256(Path(__file__).read_bytes() + made_of).hexdigest()

    def rows(self) -> Iterator[Row]:
        """Pieces of documents: name, text, and whether the document ends there.

        What is empty gives none. What else has no text is left out, and counted on stderr: in folders and patterns,
        what is no file in UTF-8 or holds a NUL; of records, those whose text is null or holds a NUL.

        Raises:
            UserError: a file or data set cannot be read, a record lacks a field, or there is no text.
        """
        found, left_out = False, dict[str, list[Any]]()
        for row in self._rows():
            if isinstance(row, dict):
                found = True
                yield row
            else:
                count, first = left_out.get(row[0], (0, row[1]))
                left_out[row[0]] = [count + 1, first]
        if not found:
            raise UserError(f"{self}: there is no document with UTF-8 text")
        for kind, (count, first) in left_out.items():
            print(f"{self.option}: {kind} without UTF-8 text left out: {count}, such as {first}", file=sys.stderr)

    def _rows(self) -> Iterator[Row | NoText]:
        if self.dataset is not None:
            yield from self._documents(self.dataset["path"], dataset_records(self.dataset))
            return
        given = {os.path.realpath(path) for path in self.paths or ()}
        for path, name in self.files.items():
            kind = Path(uncompressed(path.name)).suffix.lower()
            if kind not in RECORDS or not path.is_file():
                yield from text_rows(path, printable(name), must_be_text=os.path.realpath(path) in given)
            elif path.stat().st_size:
                fields = [field for field in (self.field, self.id_field) if field is not None]
                yield from self._documents(path, file_records(path, kind, fields), f"{name}/")

    def _documents(self, path: Any, records: Records, prefix: str = "") -> Iterator[Row | NoText]:
        where = path
        try:
            for number, (where, record) in enumerate(records, 1):
                record = json.loads(record) if isinstance(record, bytes) else record
                if not isinstance(record, dict):
                    raise ValueError("it is no JSON object")
                for option, field in (("data.field", self.field), ("data.id_field", self.id_field)):
                    if number == 1 and field is not None and field not in record:  # others may leave out what is null
                        raise UserError(f"{option}: {where} has no {field!r}, but {', '.join(map(repr, record))}")
                text = record.get(self.field)
                text = text.decode() if isinstance(text, bytes) else text
                if not isinstance(text, str | None):
                    raise UserError(f"data.field: {self.field!r} must be text, {where} has {type(text).__name__} there")
                name = f"{prefix}{number}" if self.id_field is None else as_text(record.get(self.id_field))
                if text is None or "\0" in text:
                    yield "records", where
                elif name is None:
                    raise UserError(f"data.id_field: {where} has no text or number in {self.id_field!r}")
                elif text:
                    yield {"name": printable(name), "text": printable(text), "last": True}
                where = path
        except UserError:
            raise
        except Exception as error:  # pyarrow and datasets have many types for what cannot be read
            raise UserError(f"{self.option}: {where} cannot be read: {error}") from error


def dataset_records(options: dict[str, Any]) -> Records:
    """The records of a data set, streamed unless its options say otherwise; of a folder that datasets saved, too."""
    options = {"split": "train", "streaming": True} | options
    folder = Path(options["path"])
    if (folder / "state.json").is_file():
        found: Any = datasets.load_from_disk(str(folder))
    elif (folder / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(folder))[options["split"]]
    else:
        found = datasets.load_dataset(**options)
    yield from ((f"{folder}, record {number}", record) for number, record in enumerate(found, 1))


def file_records(path: Path, kind: str, fields: list[str]) -> Records:
    """Lines of JSON that are not blank, or rows of Parquet, of which `fields` alone are read; and where each stands."""
    if kind != ".parquet":
        with open_file(path) as file:
            yield from ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        return
    with path.open("rb") as file, pq.ParquetFile(file) as table:
        names, batches = dict.fromkeys(table.schema_arrow.names), table.iter_batches(BATCH, columns=fields)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", names | row


def files_at(given: Path) -> list[tuple[str, Path, Path]]:
    """A file, all below a folder, or all that match a pattern: each file's real path, its path, and its name.

    What exists is no pattern. A name is relative to the folder, or to the pattern's part that exists. Linked files come
    last.
    """
    folder = next(path for path in (given, *given.parents) if path.exists())
    if folder == given and not given.is_dir():
        return [(os.path.realpath(given), given, Path(given.name))]
    paths = matches(folder, given.relative_to(folder).parts or ("**",))
    found = [(os.path.realpath(path), path, path.relative_to(folder)) for path in paths]
    if not found:
        raise UserError(f"data.paths: there is no file {'in' if folder == given else 'or folder'} {str(given)!r}")
    top = folder.resolve()
    return sorted(found, key=lambda file: (file[0] != str(top / file[2]), file[2]))


def matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """All but folders that a pattern's parts lead to from a folder; hidden ones only where a part begins with a dot."""
    first, rest = parts[0], parts[1:]
    if not folder.is_dir():
        return
    if first == "**":
        found, rest = folders(folder), rest or ("*",)
    elif "**" in first:
        raise UserError(f"data.paths: ** must be a whole part of a path, as in **/*.txt, got {first!r}")
    else:
        shown = (path for path in folder.iterdir() if path.name[0] != "." or first[0] == ".")
        found = (path for path in shown if path.name == first or fnmatchcase(path.name, first))
    for path in found:
        if rest:
            yield from matches(path, rest)
        elif not path.is_dir():
            yield path


def folders(top: Path) -> Iterator[Path]:
    """A folder and all below it that are not hidden, each once, linked ones last; no link to a folder that it is in."""
    own, linked, seen = [top], [], set()
    while own or linked:
        folder = (own or linked).pop(0)
        if (real := folder.resolve()) not in seen:
            seen.add(real)
            yield folder
            below = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_dir())
            own += [path for path in below if not path.is_symlink()]
            linked += [path for path in below if path.is_symlink() and not real.is_relative_to(path.resolve())]


def uncompressed(name: str) -> str:
    return name.rpartition(".")[0] if name.lower().endswith(tuple(COMPRESSED)) else name


def printable(text: str) -> str:
    """Without halves of UTF-16's pairs, which JSON and names of files can hold."""
    return text.encode("utf-8", "replace").decode()


def as_text(value: Any) -> str | None:
    """An id as text that does not depend on its column's type; None if it is no text or number."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    value = int(value) if isinstance(value, float | Decimal) and value == value // 1 else value
    return None if isinstance(value, list | dict | None) else str(value)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed as its name says."""
    codec = COMPRESSED.get(path.suffix.lower())
    with path.open("rb") as file:
        yield io.BufferedReader(pa.input_stream(file, codec)) if codec else file  # type: ignore[arg-type]


def text_rows(path: Path, name: str, must_be_text: bool) -> Iterator[Row | NoText]:
    """A text file in pieces; nothing if it is empty, and it is left out if it is no text and need not be.

    Raises:
        UserError: it cannot be read, or must be text and is none.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
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
        yield "files", path


def pieces(path: Path) -> Iterator[str]:
    """The text of a file, without a byte order mark, in pieces that end where a line does if one ends there."""
    rest = ""
    with open_file(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        while block := file.read(PIECE):
            block = rest + block
            end = block.rfind("\n") + 1 or len(block)
            yield block[:end]
            rest = block[end:]
    if rest:
        yield rest
