"""A tokenised corpus on disk: made once, from then on mapped into memory, not read.

A corpus is a folder named for what was asked for. It holds, of each split, the tokens of all documents, a separator
after each; a table of where each document and its name end; and the names. `manifest.json` says what it was made from.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from train.files import replacing_folder
from train.sources import Report, Source
from train.tokens import FILE, LEARNED_FROM, Bytes, Learned, Tokenizer, read_tokenizer

FORMAT = 1  # of the folder: a corpus of another is made anew
SPLITS = ("train", "val", "test")
AT_ONCE = 2**20  # characters that are tokenised together


@dataclass(frozen=True)
class Document:
    """A text: its name, such as a path relative to the folder that was asked for, and its tokens (n,)."""

    name: str
    tokens: np.ndarray


def mapped(path: Path, dtype: Any) -> np.ndarray:
    """The numbers in a file, which are read as they are used."""
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


class Split(Sequence[Document]):
    """The documents of a split, and their tokens in one row.

    It can be handed to another process, which maps the files for itself.
    """

    def __init__(self, folder: Path, name: str, dtype: str):
        self.folder, self.name, self.dtype = folder, name, dtype

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("folder", "name", "dtype")}

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens (n,), with a separator after each document."""
        return mapped(self.folder / f"{self.name}.tokens", self.dtype)

    @cached_property
    def table(self) -> np.ndarray:
        """(documents, 2): where each one's tokens end, separator included, and where its name ends."""
        return mapped(self.folder / f"{self.name}.documents", np.int64).reshape(-1, 2)

    @cached_property
    def names(self) -> np.ndarray:
        """All names in one row, as bytes of UTF-8."""
        return mapped(self.folder / f"{self.name}.names", np.uint8)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        tokens_end, name_end = self.table[index]
        tokens_begin, name_begin = self.table[index - 1] if index % len(self) else (0, 0)
        name = bytes(self.names[name_begin:name_end]).decode(errors="surrogateescape")
        return Document(name, self.tokens[tokens_begin : tokens_end - 1])


class SplitWriter(AbstractContextManager["SplitWriter"]):
    """Writes what a `Split` reads."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, separator: int):
        self.dtype, self.separator = dtype, np.array([separator], dtype)
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}
        self.name_bytes = 0
        with ExitStack() as files:
            self.tokens, self.table, self.names = (
                files.enter_context((folder / f"{name}.{part}").open("wb", buffering=2**18))
                for part in ("tokens", "documents", "names")
            )
            self.files = files.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.files.close()

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """A piece of the document."""
        self.tokens.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += text_bytes

    def end(self, name: str) -> None:
        """The document was whole, and this is its name. The separator counts as a byte of text, too."""
        self.add(self.separator, 1)
        written = name.encode(errors="surrogateescape")
        self.names.write(written)
        self.name_bytes += len(written)
        self.counts["documents"] += 1
        self.table.write(np.array([self.counts["tokens"], self.name_bytes], np.int64).tobytes())


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: its folder, and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.folder / FILE) if FILE in self.manifest["files"] else Bytes()

    def split(self, name: str) -> Split:
        return Split(self.folder, name, self.manifest["dtype"])

    def count(self, split: str, what: str) -> int:
        """How many documents, tokens or bytes a split has; each separator is a token and a byte."""
        return self.manifest["splits"][split][what]

    @property
    def documents(self) -> int:
        return sum(self.count(split, "documents") for split in SPLITS)


@dataclass(frozen=True)
class Request:
    """What a corpus is to be made of.

    Attributes:
        source: gives the documents.
        tokenizer: makes tokens of them, or is to be learned from those for training.
        split_of: says which split a document is for, by its name.
        shares: what `split_of` goes by, in JSON.
    """

    source: Source
    tokenizer: Tokenizer | Learned
    split_of: Callable[[str], str]
    shares: dict[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """What decides on the corpus, but for the content of the source."""
        return {"source": self.source.asked, "tokenizer": self.tokenizer.state, "shares": self.shares}

    def corpus(self, cache: Path) -> Corpus:
        """The corpus, tokenised if the cache does not hold it, or holds it of what its source was before.

        Raises:
            UserError: `Source.documents` does.
        """
        key = hashlib.sha256(json.dumps([FORMAT, self.asked], sort_keys=True).encode()).hexdigest()[:16]
        folder = cache / key
        if found := self._held(folder, self.source.state()):
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            state = self.source.state()  # another process may have made it meanwhile
            if found := self._held(folder, state):
                return found
            if (folder / "manifest.json").exists():
                print(f"{self.source.option}: {self.source.described} has changed since it was tokenised: once more")
            with replacing_folder(folder) as draft:
                manifest = {"format": FORMAT, "source_state": state} | self.asked | self._written(draft)
                manifest["files"] = {path.name: path.stat().st_size for path in draft.iterdir()}
                (draft / "manifest.json").write_text(json.dumps(manifest, indent=1))
        return Corpus(folder, manifest)

    def _held(self, folder: Path, state: str) -> Corpus | None:
        """The corpus in the folder, if it is whole and of the source's present state."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if sizes != manifest["files"] or manifest["source_state"] != state:
            return None
        return Corpus(folder, manifest)

    def _written(self, folder: Path) -> dict[str, Any]:
        """Tokenise the source into the folder: what the manifest says of it."""
        tokenizer, digest = self._tokenizer(), hashlib.sha256()
        if (content := tokenizer.to_json()) is not None:
            (folder / FILE).write_text(content, encoding="utf-8")
        dtype = np.min_scalar_type(tokenizer.size - 1)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(SplitWriter(folder, split, dtype, tokenizer.separator)) for split in SPLITS
            }
            progress = stack.enter_context(self._progress("tokenise"))
            for batch in self._batches(progress.update):
                tokens = iter(tokenizer.encode([piece for _, piece, _ in batch]))
                for name, piece, last in batch:
                    writer, text = writers[self.split_of(name)], piece.encode()
                    writer.add(next(tokens), len(text))
                    digest.update(text)
                    if last:
                        writer.end(name)
                        digest.update(f"\0{name}\0".encode(errors="surrogateescape"))
        return {
            "text_sha256": digest.hexdigest(),
            "tokenizer": self.tokenizer.state | tokenizer.state,
            "dtype": dtype.name,
            "splits": {split: writer.counts for split, writer in writers.items()},
        }

    def _tokenizer(self) -> Tokenizer:
        if not isinstance(self.tokenizer, Learned):
            return self.tokenizer
        with self._progress(f"learn {self.tokenizer.size} tokens") as progress:
            return self.tokenizer.learn(self._training_texts(progress.update))

    def _training_texts(self, report: Report) -> Iterator[str]:
        """Pieces of text for training, up to what a tokenizer is learned from."""
        characters = 0
        for name, pieces in self.source.documents(report):
            if self.split_of(name) == "train":
                for piece in pieces:
                    yield piece
                    characters += len(piece)
                    if characters >= LEARNED_FROM:
                        return

    def _progress(self, what: str) -> tqdm:
        size = self.source.size()
        return tqdm(
            total=size, desc=what, unit="B" if size is not None else " documents", unit_scale=True, disable=None
        )

    def _batches(self, report: Report) -> Iterator[list[tuple[str, str, bool]]]:
        """Pieces of text of about AT_ONCE characters together, with their document's name and whether it ends there."""
        batch, characters = [], 0
        for name, pieces in self.source.documents(report):
            before = None
            for piece in pieces:
                if before is not None:
                    batch.append((name, before, False))
                before = piece
                characters += len(piece)
                if characters >= AT_ONCE and batch:
                    yield batch
                    batch, characters = [], len(piece)
            if before is not None:
                batch.append((name, before, True))
        if batch:
            yield batch
