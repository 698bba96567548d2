"""Where text comes from: files of text, JSON lines or Parquet, compressed or not, or a Hugging Face data set.

Documents come one by one, so that memory does not grow with the text.
"""

import codecs
import gzip
import hashlib
import importlib
import io
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any

from train.errors import UserError

PIECE = 2**20  # bytes of a text file that are read at once
NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
ROWS_AT_ONCE = 64  # of Parquet

Named = tuple[str, Iterable[str]]  # a document's name and the pieces of its text
Report = Callable[[int], Any]


def needed(module: str, package: str, option: str) -> Any:
    """An optional package's module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{option} needs the package {package}, which is missing: pip install {package}") from error


# --- which files -----------------------------------------------------------------------------------------------------


def standard_library() -> dict[Path, str]:
    """The source of the running Python's standard library, without tests: text that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {path: path.relative_to(root) for path in root.rglob("*.py")}
    return {path: name.as_posix() for path, name in names.items() if not NOT_SOURCE.intersection(name.parts)}


def text_files(paths: list[str]) -> dict[Path, str]:
    """The files named, all below the folders named, and all that patterns with * match, each once, and their names.

    Hidden files are left out of folders and patterns. A name is relative to the folder, or to a pattern's part before
    its first *, and is that of the file before it was compressed; a file that is reached in several ways has the name
    that it has in the outermost folder, whatever their order.
    """
    names: dict[Path, str] = {}
    for given in sorted(map(Path, paths), key=Path.resolve):
        folder = next(path for path in (given, *given.parents) if "*" not in str(path))
        if given.is_file():
            found = {given: given.resolve().name}
        elif folder.is_dir():
            pattern = "**/*" if folder == given else str(given.relative_to(folder))
            below = {path: path.relative_to(folder) for path in sorted(folder.glob(pattern)) if path.is_file()}
            found = {p: name.as_posix() for p, name in below.items() if not any(n.startswith(".") for n in name.parts)}
        else:
            raise UserError(f"data.paths: there is no file or folder {str(given)!r}")
        if not found:
            raise UserError(f"data.paths: there is no file in {str(given)!r}")
        for path, name in found.items():
            names.setdefault(path.resolve(), uncompressed(name))
    return names


def uncompressed(name: str) -> str:
    return name.rpartition(".")[0] if name.endswith(COMPRESSED) else name


# --- what is in a file -----------------------------------------------------------------------------------------------


class Reported(io.FileIO):
    """A file that reports how many bytes were read of it."""

    def __init__(self, path: Path, report: Report):
        super().__init__(path)
        self.report = report

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.report(count or 0)
        return count


def ignore(count: int) -> None:
    """Nobody wants to know."""


@contextmanager
def opened(path: Path, report: Report = ignore) -> Iterator[io.BufferedIOBase]:
    """The content of a file, decompressed if its name says so.

    Raises:
        UserError: it cannot be read, is damaged, or needs a package that is missing.
    """
    # Arrow's reader complains of a file that was cut short, zstandard's does not.
    arrow = needed("pyarrow", "pyarrow", f"data.paths: {path}") if path.suffix == ".zst" else None
    try:
        with io.BufferedReader(Reported(path, report), PIECE) as raw:
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=raw)
            elif arrow is not None:
                yield io.BufferedReader(arrow.input_stream(raw, compression="zstd"), PIECE)
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.paths: {path} cannot be read: {reason}") from error


class NotTextError(Exception):
    """The content is not UTF-8, or holds a NUL."""


def text_pieces(path: Path, report: Report = ignore) -> Iterator[str]:
    """The text of a file, whole if it has no more than PIECE bytes, else in pieces that end where a line does.

    Raises:
        NotTextError: as soon as it is no text.
        UserError: `opened` does.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with opened(path, report) as stream:
        block = stream.read(PIECE)
        while block:
            following = stream.read(PIECE)
            try:
                text = rest + decoder.decode(block, final=not following)
            except UnicodeDecodeError as error:
                raise NotTextError(f"{error.reason} 0x{error.object[error.start]:02x}") from error
            if "\0" in text:
                raise NotTextError("it holds a NUL")
            end = (text.rfind("\n") + 1 if following else 0) or len(text)
            if end:
                yield text[:end]
            rest, block = text[end:], following


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are the text and, if any, the name of its document."""

    text: str
    name: str | None

    def document(self, record: dict[str, Any], place: str, name: str) -> Iterator[Named]:
        """The record's document, if it has text; `name` is for one without a field for it."""
        for option, field in (("data.field", self.text), ("data.id_field", self.name)):
            if field is not None and field not in record:
                raise UserError(f"{option}: {place} has no {field!r}, but {', '.join(map(repr, record))}")
        text = record[self.text]
        if not isinstance(text, str | None):
            raise UserError(f"data.field: {self.text!r} must be text, {place} has {type(text).__name__} there")
        if text and "\0" not in text:
            # JSON can hold halves of UTF-16's pairs, which are no character.
            whole = text.encode("utf-8", "replace").decode()
            yield (name if self.name is None else str(record[self.name])), [whole]


def text_documents(path: Path, name: str, named: bool, report: Report) -> Iterator[Named]:
    """The file as one document, unless it is empty or no text.

    Raises:
        UserError: it is no text and was `named` by the user, not found in a folder.
    """
    try:
        empty = not sum(len(piece) for piece in text_pieces(path))
    except NotTextError as error:
        if named:
            raise UserError(f"data.paths: {path} is no text in UTF-8: {error}") from error
        empty = True
    if empty:
        report(path.stat().st_size)
    else:
        yield name, text_pieces(path, report)


def json_documents(path: Path, name: str, fields: Fields, report: Report) -> Iterator[Named]:
    """A document for each line."""
    with opened(path, report) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number},"
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise UserError(f"data.paths: {place} is no JSON in UTF-8: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"data.paths: {place} must be a JSON object, got {type(record).__name__}")
            yield from fields.document(record, place, f"{name}/{number}")


def parquet_documents(path: Path, name: str, fields: Fields, report: Report) -> Iterator[Named]:
    """A document for each row."""
    parquet = needed("pyarrow.parquet", "pyarrow", f"data.paths: {path}")
    size, wanted = path.stat().st_size, [field for field in (fields.text, fields.name) if field is not None]
    try:
        with parquet.ParquetFile(path, pre_buffer=False, memory_map=False) as file:
            total, number = max(1, file.metadata.num_rows), 0
            columns = set(file.schema_arrow.names)
            chosen = wanted if columns.issuperset(wanted) else None  # all, to say which there are
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    yield from fields.document(record, f"{path}, row {number},", f"{name}/{number}")
                report(size * number // total - size * (number - batch.num_rows) // total)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"data.paths: {path} cannot be read: {error}") from error


# --- all of a source -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The documents of files or of a data set.

    Attributes:
        paths: files, folders, or patterns; None is the standard library. Names that end in .jsonl, .ndjson or .parquet
            hold records, all others text; .gz and .zst after that are undone.
        dataset: in place of paths, the arguments of `datasets.load_dataset`; its path is a folder or a hub's name.
        fields: of records, which one is the text, and which the document's name.
    """

    paths: list[str] | None
    dataset: dict[str, Any] | None
    fields: Fields

    @property
    def option(self) -> str:
        return "data.paths" if self.dataset is None else "data.dataset"

    @property
    def described(self) -> str:
        if self.dataset is not None:
            return str(self.dataset["path"])
        return "the standard library" if self.paths is None else str(self.paths)

    @property
    def asked(self) -> dict[str, Any]:
        """What tells the source apart from others, in JSON."""
        if self.dataset is not None:
            return {"dataset": self.dataset, "fields": asdict(self.fields)}
        roots = [sysconfig.get_path("stdlib")] if self.paths is None else self.paths
        resolved = sorted(str(Path(path).resolve()) for path in roots)
        return {"paths": resolved, "code": self.paths is None, "fields": asdict(self.fields)}

    def files(self) -> dict[Path, str]:
        """The source's files that are here, and their names, in the order of these; a hub's data set has none.

        Raises:
            UserError: a path does not exist.
        """
        if self.dataset is not None:
            names = {path: str(path) for path in dataset_files(self.dataset)}
        else:
            names = standard_library() if self.paths is None else text_files(self.paths)
        return dict(sorted(names.items(), key=lambda item: (item[1], item[0])))

    def state(self) -> str:
        """A digest of what the system knows of the files without reading them: names, sizes, and times of change."""
        digest = hashlib.sha256()
        for path, name in self.files().items():
            status = path.stat()
            digest.update(f"{path}\0{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def size(self) -> int | None:
        """How much `documents` will report: bytes of files; unknown for a data set, which reports documents."""
        return sum(path.stat().st_size for path in self.files()) if self.dataset is None else None

    def documents(self, report: Report = ignore) -> Iterator[Named]:
        """All documents that have text: names and pieces of text, files in the order of their names.

        Text files that are not UTF-8 are left out of folders, and so is what is empty or holds a NUL.

        Raises:
            UserError: a file or data set cannot be read, or a record has not the fields that were asked for.
        """
        if self.dataset is not None:
            yield from dataset_documents(self.dataset, self.fields, report)
            return
        named = {Path(path).resolve() for path in self.paths or () if Path(path).is_file()}
        for path, name in self.files().items():
            kind = uncompressed(path.name)
            if kind.endswith(JSON_LINES):
                yield from json_documents(path, name, self.fields, report)
            elif kind.endswith(PARQUET):
                yield from parquet_documents(path, name, self.fields, report)
            else:
                yield from text_documents(path, name, path in named, report)


def dataset_files(options: dict[str, Any]) -> Iterator[Path]:
    """The files that are here among those that the arguments of `datasets.load_dataset` name."""
    folder = Path(options["path"])
    patterns = [options["path"], options.get("data_dir") or [], options.get("data_files") or []]
    while patterns:
        pattern = patterns.pop()
        if not isinstance(pattern, str):
            patterns += pattern.values() if isinstance(pattern, dict) else pattern
            continue
        for place in {pattern, str(folder / pattern)}:
            for found in map(Path, glob(place, recursive=True)):  # noqa: PTH207 (a pattern may be absolute)
                yield from [found] if found.is_file() else (path for path in found.rglob("*") if path.is_file())


def dataset_documents(options: dict[str, Any], fields: Fields, report: Report) -> Iterator[Named]:
    """A document for each row of a Hugging Face data set, streamed unless the options say otherwise."""
    datasets = needed("datasets", "datasets", "data.dataset")
    folder = Path(options["path"])
    options = {"split": "train", "streaming": True} | options
    try:
        if (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))[options["split"]]
        else:
            rows = datasets.load_dataset(**options)
        if isinstance(rows, dict):
            raise UserError(f"data.dataset: give a split, one of {', '.join(rows)}")
        for number, record in enumerate(rows, 1):
            yield from fields.document(record, f"{folder}, row {number},", str(number))
            report(1)
    except UserError:
        raise
    except Exception as error:  # the library has no type of its own for what is wrong with a data set
        raise UserError(f"data.dataset: {folder} cannot be read: {error}") from error
