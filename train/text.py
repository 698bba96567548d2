"""Text as training data: whole files become training, validation or test documents by a hash of their names."""

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.errors import UserError

VOCAB_SIZE = 256  # bytes are the tokens
SEPARATOR = b"\0"  # between documents that are joined for training: it occurs in no text
SplitBy = Literal["file", "folder"]
NOT_SOURCE = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text file: its name, relative to the folder that was asked for, and its bytes (n,) as uint8."""

    name: str
    tokens: Tensor


def standard_library() -> dict[Path, str]:
    """The source of the running Python's standard library, without tests: text that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {path: path.relative_to(root) for path in root.rglob("*.py")}
    return {path: name.as_posix() for path, name in names.items() if not NOT_SOURCE.intersection(name.parts)}


def text_files(paths: list[str]) -> dict[Path, str]:
    """The files named, all below the folders named, and all that patterns with * match, each once, and their names.

    Hidden files are left out of folders and patterns. A name is relative to the folder, or to a pattern's part before
    its first *; a file that is reached in several ways has the name that it has in the outermost folder, whatever
    their order.
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
            names.setdefault(path.resolve(), name)
    return names


def read_documents(paths: list[str] | None) -> list[Document]:
    """All documents in the order of their names; files that are empty, not UTF-8, or hold a NUL are left out.

    Raises:
        UserError: a path does not exist or cannot be read, or there is no text in any.
    """
    documents = []
    names = standard_library() if paths is None else text_files(paths)
    for path, name in sorted(names.items(), key=lambda item: (item[1], item[0])):
        try:
            content = path.read_bytes()
            content.decode()
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise UserError(f"data.paths: {path} cannot be read: {error.strerror}") from error
        if content and SEPARATOR not in content:
            documents.append(Document(name, torch.frombuffer(bytearray(content), dtype=torch.uint8)))
    if not documents:
        raise UserError(f"data.paths: no file with UTF-8 text in {'the standard library' if paths is None else paths}")
    return documents


def split_of(name: str, val_fraction: float, test_fraction: float, split_by: SplitBy = "file") -> str:
    """train, val or test, from a hash of the document's name alone, or of its first part, the outermost folder."""
    name = name if split_by == "file" else name.split("/", 1)[0]
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


class Windows(Dataset[Tensor]):
    """Item i is the window of `length` tokens that starts at `i * stride`, as int64."""

    def __init__(self, tokens: Tensor, length: int, stride: int = 1):
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        return self.tokens[start : start + self.length].long()


class RandomBatches(Sampler[list[int]]):
    """Batches of random indices; batch number s depends on (seed, s, rank) alone, so a resumed run draws the same."""

    def __init__(self, size: int, batch_size: int, first: int, last: int, seed: int, rank: int):
        self.size, self.batch_size, self.first, self.last = size, batch_size, first, last
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        return self.last

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield np.random.default_rng((self.seed, step, self.rank)).integers(self.size, size=self.batch_size).tolist()


class TextData(L.LightningDataModule):
    """Windows of `context_length + 1` bytes from text files.

    Args:
        context_length: training length L in tokens; a window has one more, the last target.
        paths: text files, folders of them, or patterns such as `texts/**/*.txt`; by default the source of Python's
            standard library.
        batch_size: windows a step and device.
        val_fraction: share of the files that is held out for validation.
        test_fraction: share of the files that is held out for `test` and for the extrapolation measure.
        split_by: what is held out as a whole: each file by itself, or all of an outermost folder, such as a package.
        max_val_windows: how many windows, evenly spread, validation and test use at most.
        num_workers: processes that load data; 0 loads in the training process.
        seed: of the random windows; `seed_everything` sets it.

    Raises:
        UserError: a size is too small, a fraction is outside (0, 1), or, in `setup`, there is not enough text.
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
    ):
        super().__init__()
        for name, size, least in (
            ("context_length", context_length, 1),
            ("batch_size", batch_size, 1),
            ("max_val_windows", max_val_windows, 1),
            ("num_workers", num_workers, 0),
        ):
            if size < least:
                raise UserError(f"data.{name} must be {least} or above, got {size}")
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction < 0.5:
                raise UserError(f"data.{name} must be between 0 and 0.5, got {fraction}")
        self.save_hyperparameters()
        self.context_length = context_length
        self.paths = paths
        self.batch_size = batch_size
        self.split = val_fraction, test_fraction, split_by
        self.max_val_windows = max_val_windows
        self.num_workers = num_workers
        self.seed = seed
        self._splits: dict[str, list[Document]] = {}

    def documents(self, split: str) -> list[Document]:
        """The documents of `split`: train, val or test.

        Raises:
            UserError: `read_documents` does, or the split got no document.
        """
        if not self._splits:
            splits: dict[str, list[Document]] = {"train": [], "val": [], "test": []}
            for document in read_documents(self.paths):
                splits[split_of(document.name, *self.split)].append(document)
            self._splits = splits
        if not self._splits[split]:
            count = sum(map(len, self._splits.values()))
            change = (
                "lower data.val_fraction and data.test_fraction" if split == "train" else f"raise data.{split}_fraction"
            )
            raise UserError(
                f"data.paths: none of the {count} files with text fell to the {split} split, which holds out whole "
                f"files; give more files, or {change}"
            )
        return self._splits[split]

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for split in needed:
            self._windows(split, stride=1)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        windows = self._windows("train", stride=1)
        per_step = trainer.accumulate_grad_batches
        batches = RandomBatches(
            len(windows),
            self.batch_size,
            trainer.global_step * per_step,
            trainer.max_steps * per_step,
            self.seed,
            trainer.global_rank,
        )
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
        separator = torch.tensor(list(SEPARATOR), dtype=torch.uint8)
        tokens = torch.cat([part for document in self.documents(split) for part in (document.tokens, separator)])
        windows = Windows(tokens, self.context_length + 1, stride)
        if not len(windows):
            raise UserError(
                f"data: the {split} text has {len(tokens)} bytes, less than one window of "
                f"data.context_length + 1 = {self.context_length + 1}; give more text, or lower data.context_length"
            )
        return windows
