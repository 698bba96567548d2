"""Text as training data: whole documents are for training, validation or test, by a hash of their names."""

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.corpus import Corpus, Request, Split
from train.errors import UserError
from train.sources import Fields, Source
from train.tokens import tokenizer_of

SplitBy = Literal["file", "folder"]
CACHE = "runs/.cache"


def split_of(name: str, val_fraction: float, test_fraction: float, split_by: SplitBy = "file") -> str:
    """train, val or test, from a hash of the document's name alone, or of its first part, the outermost folder."""
    name = name if split_by == "file" else name.split("/", 1)[0]
    place = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


class Windows(Dataset[Tensor | tuple[Tensor, ...]]):
    """Item i is the window of `length` tokens that starts at `i * stride` in a split's text, as int64.

    With a `separator`, it comes as inputs, targets, and the numbers of the inputs' documents, (length - 1,) each. What
    separates two documents is the end of the first as a target, and the beginning of the second as an input.
    """

    def __init__(self, split: Split, length: int, stride: int = 1, separator: int | None = None):
        self.split, self.length, self.stride, self.separator = split, length, stride, separator

    def __len__(self) -> int:
        return max(0, (len(self.split.tokens) - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        start = index * self.stride
        window = torch.from_numpy(self.split.tokens[start : start + self.length].astype(np.int64))
        if self.separator is None:
            return window
        return window[:-1], window[1:], (window[:-1] == self.separator).cumsum(0)


class RandomBatches(Sampler[list[int]]):
    """Batches of random indices; batch number s depends on (seed, s, rank) alone, so a resumed run draws the same."""

    def __init__(self, size: int, batch_size: int, first: int, last: int, seed: int, rank: int):
        self.size, self.batch_size, self.first, self.last = size, batch_size, first, last
        self.seed, self.rank = seed, rank

    @classmethod
    def of_training(cls, trainer: L.Trainer | None, size: int, batch_size: int, seed: int) -> "RandomBatches":
        """From the step that the trainer is at to its last."""
        assert trainer is not None
        batches = trainer.accumulate_grad_batches
        first, last = trainer.global_step * batches, trainer.max_steps * batches
        return cls(size, batch_size, first, last, seed, trainer.global_rank)

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
            standard library. JSON lines (.jsonl, .ndjson) and Parquet (.parquet) have a document a record. All but
            Parquet may be compressed (.gz, .zst).
        dataset: in place of paths, a Hugging Face data set, from a hub or a folder: its name, or the arguments of
            `datasets.load_dataset`, such as `{path: wikitext, name: wikitext-103-raw-v1}`; its split is train and
            streamed unless they say otherwise.
        field: of a record, what holds the text.
        id_field: of a record, what names the document, which decides on its split; by default its number in the file.
        batch_size: windows a step and device.
        val_fraction: share of the documents that is held out for validation.
        test_fraction: share of the documents that is held out for `test` and for the extrapolation measure.
        split_by: what is held out as a whole: each document by itself, or all whose names have the same first part: an
            outermost folder, such as a package, or a file of records.
        max_val_windows: how many windows, evenly spread, validation and test use at most.
        num_workers: processes that load data; 0 loads in the training process.
        seed: of the random windows; `seed_everything` sets it.
        cache: folder for the tokenised text, which is made once for each source, and anew when that has changed.
        tokenizer: bytes, the path of a `tokenizer.json`, or bpe, which learns one from the documents for training.
        tokenizer_size: how many tokens bpe is to learn; for others, room for so many, by default as many as they have.
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
        tokenizer_size: int | None = None,
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
        if options is not None and "path" not in options:
            raise UserError(f"data.dataset must have a path, a folder or a hub's name, got {options}")
        self.save_hyperparameters()
        self.context_length = context_length
        self.source = Source(paths, options, Fields(field, id_field))
        self.batch_size = batch_size
        self.shares = {"val_fraction": val_fraction, "test_fraction": test_fraction, "split_by": split_by}
        self.max_val_windows = max_val_windows
        self.num_workers = num_workers
        self.seed = seed
        self.cache = Path(cache)
        self.separate_documents = separate_documents
        self.tokenizer, self.vocab_size = tokenizer_of(tokenizer, tokenizer_size)

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised text.

        Raises:
            UserError: the source cannot be read, or has no text.
        """
        request = Request(self.source, self.tokenizer, partial(split_of, **self.shares), self.shares)
        corpus = request.corpus(self.cache)
        if not corpus.documents:
            raise UserError(f"{self.source.option}: no document with UTF-8 text in {self.source.described}")
        return corpus

    def documents(self, split: str) -> Split:
        """The documents of `split`: train, val or test.

        Raises:
            UserError: there is no text, or the split got no document.
        """
        documents = self.corpus.split(split)
        if not len(documents):
            change = (
                "lower data.val_fraction and data.test_fraction" if split == "train" else f"raise data.{split}_fraction"
            )
            raise UserError(
                f"{self.source.option}: none of the {self.corpus.documents} documents with text fell to the {split} "
                f"split, which holds out whole documents; give more, or {change}"
            )
        return documents

    @property
    def unit(self) -> str:
        """What a token is called."""
        return self.corpus.tokenizer.unit

    def tokens_per_byte(self, split: str) -> float:
        """Of the split's text, separators being one of each: what makes losses of different tokens comparable."""
        return self.corpus.count(split, "tokens") / self.corpus.count(split, "bytes")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the text's hash, and the tokenizer, without which its model is of no use."""
        return {"text_sha256": self.corpus.manifest["text_sha256"], "tokenizer": self.corpus.tokenizer.to_json()}

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for split in needed:
            self._windows(split, stride=1)

    def train_dataloader(self) -> DataLoader:
        windows = self._windows("train", stride=1)
        batches = RandomBatches.of_training(self.trainer, len(windows), self.batch_size, self.seed)
        return DataLoader(windows, batch_sampler=batches, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader:
        return self._held_out("test")

    def _held_out(self, split: str) -> DataLoader:
        starts = len(self._windows(split, stride=1))
        stride = max(self.context_length, math.ceil(starts / self.max_val_windows))
        return DataLoader(self._windows(split, stride), batch_size=self.batch_size, num_workers=self.num_workers)

    def _windows(self, split: str, stride: int) -> Windows:
        documents = self.documents(split)
        separator = self.corpus.tokenizer.separator if self.separate_documents else None
        windows = Windows(documents, self.context_length + 1, stride, separator)
        if not len(windows):
            raise UserError(
                f"data: the {split} text has {len(documents.tokens)} {self.corpus.tokenizer.unit}s, less than one "
                f"window of data.context_length + 1 = {self.context_length + 1}; give more text, or lower "
                "data.context_length"
            )
        return windows


def tokenizer_json_in(checkpoint: dict[str, Any]) -> str | None:
    """The tokenizer.json of a checkpoint's tokens; none if these are bytes."""
    return checkpoint.get(TextData.__qualname__, {}).get("tokenizer")
