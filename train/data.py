"""What is trained on? Windows of tokens; whole documents are held out for validation and test, by their names."""

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import torch
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.errors import UserError
from train.sources import Source
from train.tokens import is_bytes, read_tokenizer, separator, tokenizer_from, vocabulary_size

CACHE = "runs/.cache"
ROWS = 8  # of text that are tokenised together
CUT = ("val_fraction", "test_fraction", "split_by")  # options that decide which text is held out
SplitBy = Literal["file", "folder"]


@dataclass(frozen=True)
class Document:
    """A text: its name, such as a path relative to the folder that was asked for, and its tokens (n,)."""

    name: str
    tokens: np.ndarray


@cache
def tokenizer_and_separator(content: str) -> tuple[Tokenizer, int | None]:
    tokenizer = tokenizer_from(content)
    return tokenizer, separator(tokenizer)


def digest(text: str) -> int:
    """56 bits, which float64 holds, too."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def tokenise(batch: dict[str, list[Any]], content: str, dtype: str, split_by: SplitBy) -> dict[str, list[Any]]:
    """Tokens of rows of text, and what else is to be known of them.

    A document ends in a separator, which counts as a byte. Its place in [0, 1) decides on its split: a hash of its name
    alone, or of the name's first part.
    """
    tokenizer, end = tokenizer_and_separator(content)
    encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
    ends = [[end] * last for last in batch["last"]]
    names = [name if split_by == "file" else name.split("/", 1)[0] for name in batch["name"]]
    return {
        "tokens": [np.array(row.ids + end, dtype) for row, end in zip(encoded, ends, strict=True)],
        "bytes": [len(text.encode()) + len(end) for text, end in zip(batch["text"], ends, strict=True)],
        "digest": [digest(f"{name}\0{text}") for name, text in zip(batch["name"], batch["text"], strict=True)],
        "place": [digest(name) / 2**56 for name in names],
    }


def tokenised(source: Source, tokenizer: Tokenizer, split_by: SplitBy, cache: Path) -> datasets.Dataset:
    """The source's rows of text with their tokens, from the cache if they are there.

    Raises:
        UserError: the source cannot be read, has no text, or what is cached of it is damaged.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    cache.mkdir(parents=True, exist_ok=True)
    dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1).name
    try:
        with FileLock(cache / ".lock"):  # of several processes, one tokenises
            texts = datasets.Dataset.from_generator(source.rows, cache_dir=str(cache), fingerprint=source.fingerprint)
            return texts.map(
                tokenise,
                batched=True,
                batch_size=ROWS,
                writer_batch_size=ROWS * 32,
                remove_columns=["text"],
                fn_kwargs={"content": tokenizer.to_str(), "dtype": dtype, "split_by": split_by},
                desc="tokenise",
            )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error
    except pa.ArrowInvalid as error:
        raise UserError(f"data.cache: {cache} is damaged; remove it, and it is made again: {error}") from error


class Corpus:
    """A tokenised text in Arrow files that are mapped into memory, and its splits: train, val, test.

    Documents for test and validation are those whose places are below the fractions held out. Where that leaves a split
    without any document, each document is cut instead: the beginning is for training, the end for test.
    """

    def __init__(self, rows: datasets.Dataset, val_fraction: float, test_fraction: float):
        self.made_of = rows, val_fraction, test_fraction
        columns = {name: rows.data.column(name) for name in rows.column_names}
        is_last, digests = columns["last"].to_numpy(), columns["digest"].to_numpy()
        last, document_of_row = np.flatnonzero(is_last), np.cumsum(is_last) - is_last
        self.names = columns["name"]
        self.digest = hashlib.sha256(digests.tobytes()).hexdigest()
        self.tokens = pa.chunked_array([chunk.flatten() for chunk in columns["tokens"].chunks])
        ends = np.cumsum(np.concatenate([chunk.value_lengths() for chunk in columns["tokens"].chunks]))[last]
        lengths = np.diff(ends, prepend=0)
        sizes = np.diff(np.cumsum(columns["bytes"].to_numpy())[last], prepend=0)
        places = columns["place"].to_numpy()[last]
        held_out = test_fraction + val_fraction
        bounds = {"test": (0.0, test_fraction), "val": (test_fraction, held_out), "train": (held_out, 1.0)}
        chosen = {name: np.flatnonzero((low <= places) & (places < high)) for name, (low, high) in bounds.items()}
        if not (whole := all(map(len, chosen.values()))):
            chosen = dict.fromkeys(bounds, np.arange(len(last)))
        self.splits = {}
        for name, documents in chosen.items():
            low, high = (0.0, 1.0) if whole else bounds[name]  # of a document, from its end
            starts, stops = (ends - np.round(share * lengths).astype(np.int64) for share in (high, low))
            tokens_per_byte = float(lengths[documents].sum() / sizes[documents].sum())
            text = digests[np.isin(document_of_row, documents)].tobytes() + repr((low, high)).encode()
            spans = np.stack((last, starts, stops, ends))[:, documents]
            self.splits[name] = Split(self, spans, tokens_per_byte, hashlib.sha256(text).hexdigest())

    def __reduce__(self) -> Any:  # another process maps the files for itself
        return Corpus, self.made_of

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of all."""
        return self.tokens.slice(start, stop - start).to_numpy()


class Split(Sequence[Document]):
    """The documents of a split, each `start` to `stop` in the corpus, and all their tokens in one row.

    `text_sha256` is a hash of the documents' names and texts, and of the part of each that the split has.
    """

    def __init__(self, corpus: Corpus, spans: np.ndarray, tokens_per_byte: float, text_sha256: str):
        self.corpus, self.tokens_per_byte, self.text_sha256 = corpus, tokens_per_byte, text_sha256
        self.rows, starts, stops, ends = spans  # of each document: its last row, and places in the corpus
        self.starts, self.stops = starts, stops
        self.whole = (starts < stops) & (stops == ends)  # with the separator at its end
        self.row_ends = np.cumsum(stops - starts)
        self.size = int(self.row_ends[-1])  # tokens, separators included

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        start, stop = int(self.starts[index]), int(self.stops[index] - self.whole[index])
        return Document(self.corpus.names[int(self.rows[index])].as_py(), self.corpus.read(start, stop))

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens of the row."""
        stop = start + length
        first, last = np.searchsorted(self.row_ends, (start, stop - 1), side="right")
        within = slice(first, last + 1)
        ends = np.minimum(self.row_ends[within], stop)
        shifts = self.stops[within] - self.row_ends[within]
        places = np.stack((np.append(start, ends[:-1]) + shifts, ends + shifts), 1)  # in the corpus
        return np.concatenate([self.corpus.read(*place) for place in places.tolist()])


class Windows(Dataset[Tensor | tuple[Tensor, ...]]):
    """Item i is the window of `length` tokens that starts at `i * stride` in a split's text, as int64.

    With a `separator`, it comes as inputs, targets, and the numbers of the inputs' documents, (length - 1,) each. What
    separates two documents is the end of the first as a target, and the beginning of the second as an input.
    """

    def __init__(self, split: Split, length: int, stride: int = 1, separator: int | None = None):
        self.split, self.length, self.stride, self.separator = split, length, stride, separator

    def __len__(self) -> int:
        return max(0, (self.split.size - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        window = torch.from_numpy(self.split.read(index * self.stride, self.length).astype(np.int64))
        if self.separator is None:
            return window
        return window[:-1], window[1:], (window[:-1] == self.separator).cumsum(0)


class RandomBatches(Sampler[list[int]]):
    """Batches of random indices; batch number s depends on (seed, s, rank) alone, so a resumed run draws the same.

    Devices that share windows have one rank.
    """

    def __init__(self, size: int, batch_size: int, first: int, last: int, seed: int, rank: int):
        self.size, self.batch_size, self.first, self.last = size, batch_size, first, last
        self.seed, self.rank = seed, rank

    @classmethod
    def of_training(cls, trainer: L.Trainer | None, size: int, batch_size: int, seed: int) -> "RandomBatches":
        """From the step that the trainer is at to its last."""
        assert trainer is not None
        batches = trainer.accumulate_grad_batches
        first, last = trainer.global_step * batches, trainer.max_steps * batches
        model: Any = trainer.lightning_module
        sharing = 1 if model is None else model.options.context_parallel_size
        return cls(size, batch_size, first, last, seed, trainer.global_rank // sharing)

    def __len__(self) -> int:
        return self.last

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield np.random.default_rng((self.seed, step, self.rank)).integers(self.size, size=self.batch_size).tolist()


def check_sizes(*sizes: tuple[str, int, int]) -> None:
    """Raise a UserError for the first option, its value and the least that it may be, that is too small."""
    for name, size, least in sizes:
        if size < least:
            raise UserError(f"data.{name} must be {least} or above, got {size}")


class TextData(L.LightningDataModule):
    """Windows of `context_length + 1` tokens of text.

    Args:
        context_length: training length L in tokens; a window has one more, the last target.
        paths: text files, folders of them, or patterns such as `texts/**/*.txt`; by default the source of Python's
            standard library. What exists is no pattern. JSON lines (.jsonl, .ndjson) and Parquet (.parquet) have a
            document a record. All but Parquet may be compressed (.gz, .bz2, .zst).
        dataset: in place of paths, a Hugging Face data set, from a hub or a folder: its name, or the arguments of
            `datasets.load_dataset`, such as `{path: wikitext, name: wikitext-103-raw-v1}`; its split is train and
            streamed unless they say otherwise.
        field: of a record, what holds the text.
        id_field: of a record, what names the document, which decides on its split; by default its number in the file.
        batch_size: windows a step and device.
        val_fraction: share of the documents that is held out for validation.
        test_fraction: share of the documents that is held out for `test` and for the extrapolation measure.
        split_by: what is held out as a whole: each document by itself, or all whose names have the same first part: an
            outermost folder, such as a package, or a file of records. Where there are too few of them for all three
            splits, the end of each document is held out instead.
        max_val_windows: how many windows, evenly spread, validation and test use at most.
        num_workers: processes that load data; 0 loads in the training process.
        seed: of the random windows; `seed_everything` sets it.
        cache: folder for the tokenised text, which is made once for each source, and anew when that has changed.
        tokenizer: bytes, or the path of a `tokenizer.json`.
        separate_documents: whether tokens of a window attend to their own document alone.

    Raises:
        UserError: a size is too small, a fraction is out of range, or, in `setup`, the source cannot be read or has
            not enough text.
    """

    def __init__(
        self,
        context_length: int,
        paths: list[str] | None = None,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_by: SplitBy = "file",
        max_val_windows: int = 512,
        num_workers: int = 0,
        seed: int = 1,
        dataset: str | dict[str, Any] | None = None,
        field: str = "text",
        id_field: str | None = None,
        cache: str = CACHE,
        tokenizer: str = "bytes",
        separate_documents: bool = False,
    ):
        super().__init__()
        check_sizes(
            ("context_length", context_length, 1),
            ("batch_size", batch_size, 1),
            ("max_val_windows", max_val_windows, 1),
            ("num_workers", num_workers, 0),
        )
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction < 0.5:
                raise UserError(f"data.{name} must be between 0 and 0.5, got {fraction}")
        options = {"path": dataset} if isinstance(dataset, str) else dataset
        if options is not None and paths is not None:
            raise UserError("data.dataset and data.paths are two sources; give one")
        if options is not None and not isinstance(options.get("path"), str):
            raise UserError(f"data.dataset must have a path, a folder or a hub's name, got {options}")
        self.save_hyperparameters()
        self.options: Any = self.hparams
        self.earlier: list[str] = []  # hashes of texts that the model was trained on before this one
        self.source = Source(None if paths is None else tuple(paths), options, field, id_field)
        self.tokenizer = read_tokenizer(tokenizer)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.unit = "byte" if is_bytes(self.tokenizer) else "token"  # what a token is called
        self.separator = separator(self.tokenizer) if separate_documents else None

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised text, from the cache if it is there.

        Raises:
            UserError: the source cannot be read, or has no text.
        """
        options = self.options
        rows = tokenised(self.source, self.tokenizer, options.split_by, Path(options.cache))
        return Corpus(rows, options.val_fraction, options.test_fraction)

    def documents(self, split: str) -> Split:
        """The documents of `split`: train, val or test."""
        return self.corpus.splits[split]

    def tokens_per_byte(self, split: str) -> float:
        """Of the split's text, separators being one of each: what makes losses of different tokens comparable."""
        return self.corpus.splits[split].tokens_per_byte

    @cached_property
    def held_out(self) -> dict[str, str]:
        """The hashes of the text that is held out."""
        return {split: self.corpus.splits[split].text_sha256 for split in ("val", "test")}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: hashes of the text, of others that a run before it was trained on, which this one
        began from, and the tokenizer, without which its model is of no use."""
        text = {"text_sha256": self.corpus.digest, "held_out_sha256": self.held_out, "earlier_texts": self.earlier}
        return text | {"tokenizer": self.tokenizer.to_str()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there = state_dict.get("held_out_sha256")  # which 0.2.0 did not keep
        same = state_dict["text_sha256"] == self.corpus.digest if there is None else there == self.held_out
        self.earlier = [*state_dict.get("earlier_texts", ()), *(() if same else (state_dict["text_sha256"],))]

    def doubt(self, there: dict[str, Any], options: dict[str, Any], split: str, allow_changed: bool) -> str:
        """Why it is not certain that a split's text was held out from a training; nothing if it is.

        Args:
            there, options: the data's state and options in the training's checkpoint.
            split: val or test.
            allow_changed: whether a text that has changed may be measured.

        Raises:
            UserError: the text is known to have changed, and that is not allowed.
        """
        if "held_out_sha256" not in there:  # a checkpoint of 0.2.0
            same_cut = all(options.get(name) == self.options[name] for name in CUT)
            if same_cut and there.get("text_sha256") == self.corpus.digest:
                return ""
            return f"the checkpoint is of an earlier version, and cannot say whether the {split} text was held out"
        if there["held_out_sha256"][split] == self.held_out[split] and not there["earlier_texts"]:
            return ""
        why = "the run began from one of another text" if there["earlier_texts"] else "the text has changed since"
        doubt = f"the model may have been trained on the {split} text: {why}"
        if not allow_changed:
            raise UserError(f"{doubt} ({self.source}); --allow_changed_text true measures it with a note")
        return doubt

    def setup(self, stage: str) -> None:
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            self._windows(split)

    def train_dataloader(self) -> DataLoader:
        windows, options = self._windows("train"), self.options
        batches = RandomBatches.of_training(self.trainer, len(windows), options.batch_size, options.seed)
        return DataLoader(windows, num_workers=options.num_workers, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader:
        return self._held_out("test")

    def _held_out(self, split: str) -> DataLoader:
        options = self.options
        stride = max(options.context_length, math.ceil(len(self._windows(split)) / options.max_val_windows))
        return DataLoader(self._windows(split, stride), options.batch_size, num_workers=options.num_workers)

    def _windows(self, split: str, stride: int = 1) -> Windows:
        documents, length = self.documents(split), self.options.context_length + 1
        if documents.size < length:
            raise UserError(
                f"{self.source}: the {split} text has {documents.size} {self.unit}s, less than one window of "
                f"data.context_length + 1 = {length}; give more text, or lower data.context_length"
            )
        return Windows(documents, length, stride, self.separator)
