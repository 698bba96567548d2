"""Text as data: what is read, how it is split, and which windows are drawn from it."""

import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_corpus

from train.corpus import Split
from train.errors import UserError
from train.language_model import LanguageModel
from train.sources import NOT_SOURCE, standard_library
from train.text import (
    RandomBatches,
    TextData,
    Windows,
    split_of,
)


def small(corpus: Path, **changes) -> TextData:
    options = {"context_length": 16, "paths": [str(corpus)], "batch_size": 2, "cache": str(corpus.parent / "cache")}
    return TextData(**options | changes)


def names(data: TextData) -> dict[str, set[str]]:
    return {split: {document.name for document in data.documents(split)} for split in ("train", "val", "test")}


def test_a_file_keeps_its_split_whatever_else_changes(tmp_path: Path) -> None:
    before = names(small(write_corpus(tmp_path / "a", files=60)))
    other = write_corpus(tmp_path / "elsewhere" / "b", files=200, size=50)
    (other / "3.txt").write_text("quite another text")
    after = names(small(other, seed=7))
    assert all(before.values())
    for split, old in before.items():
        assert old == after[split] & set.union(*before.values())


def test_no_document_is_in_two_splits_and_none_is_lost(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a", files=60)
    found = list(itertools.chain(*names(small(corpus)).values()))
    assert sorted(found) == sorted(path.name for path in corpus.iterdir())


def test_splits_have_the_shares_that_were_asked_for() -> None:
    count = 20000
    splits = [split_of(f"folder/file{i}.py", val_fraction=0.05, test_fraction=0.1) for i in range(count)]
    for split, share in (("val", 0.05), ("test", 0.1), ("train", 0.85)):
        five_sigma = 5 * math.sqrt(share * (1 - share) / count)
        assert abs(splits.count(split) / count - share) < five_sigma


@given(st.text(), st.floats(0.01, 0.4))
def test_holding_out_more_for_validation_never_uses_a_test_file(name: str, val_fraction: float) -> None:
    if split_of(name, 0.05, 0.1) == "test":
        assert split_of(name, val_fraction, 0.1) == "test"


def test_the_default_corpus_is_the_standard_library_without_packages_and_tests(tmp_path: Path) -> None:
    files = set(standard_library().values())
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= files
    assert not [name for name in files if NOT_SOURCE & set(name.split("/"))]
    assert not [name for name in files if "site-packages" in name or "/test/" in name or name.startswith("test/")]
    data = TextData(context_length=128, cache=str(tmp_path))
    longest = 64 * 128 + 1  # the farthest that `make demo` looks
    assert sum(len(document.tokens) >= longest for document in data.documents("test")) >= 8
    assert sum(len(document.tokens) for document in data.documents("train")) > 5_000_000


@given(st.lists(st.text("ab./-", min_size=1, max_size=8), min_size=1, max_size=4))
def test_split_by_folder_keeps_all_of_an_outermost_folder_together(parts: list[str]) -> None:
    folder, *below = [part.replace("/", "") + "x" for part in parts]
    name = "/".join((folder, *below))
    assert split_of(name, 0.3, 0.3, "folder") == split_of(f"{folder}/other", 0.3, 0.3, "folder")
    assert split_of(name, 0.3, 0.3, "folder") == split_of(folder, 0.3, 0.3, "file")


def test_training_text_is_every_document_with_a_separator_after_it(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a")
    data = small(corpus)
    data.setup("fit")
    documents = data.documents("train")
    text = data._windows("train", stride=1).split.tokens
    assert bytes(text) == b"".join((corpus / document.name).read_bytes() + b"\0" for document in documents)
    assert [document.name for document in documents] == sorted(document.name for document in documents)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["uint8", "uint16", "uint32"]))
def test_windows_are_all_that_fit(
    tmp_path_factory: pytest.TempPathFactory, size: int, length: int, stride: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    np.arange(size, dtype=dtype).tofile(folder / "train.tokens")
    windows = Windows(Split(folder, "train", dtype), length, stride)
    expected = [list(range(start, start + length)) for start in range(0, size, stride) if start + length <= size]
    items = [windows[i] for i in range(len(windows))]
    assert [item.tolist() for item in items if isinstance(item, torch.Tensor)] == expected
    assert all(item.dtype == torch.int64 for item in items if isinstance(item, torch.Tensor))


@given(st.integers(0, 20), st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_a_batch_depends_on_its_number_alone(first: int, seed: int, rank: int) -> None:
    whole = list(RandomBatches(1000, 4, 0, 20, seed, rank))
    assert list(RandomBatches(1000, 4, first, 20, seed, rank)) == whole[first:]


def test_seeds_devices_and_steps_draw_different_batches() -> None:
    drawn = [
        tuple(batch)
        for seed, rank in itertools.product((1, 2), (0, 1))
        for batch in RandomBatches(10**9, 4, 0, 5, seed, rank)
    ]
    assert len(set(drawn)) == 20


def test_every_window_can_be_drawn() -> None:
    drawn = set(itertools.chain(*RandomBatches(10, 8, 0, 100, seed=1, rank=0)))
    assert drawn == set(range(10))  # the chance to miss one is 10 * 0.9^800 < 1e-35


@pytest.mark.parametrize("max_val_windows", [1, 3, 7, 50, 10000])
def test_validation_windows_do_not_overlap_and_are_at_most_as_many_as_said(
    tmp_path: Path, max_val_windows: int
) -> None:
    data = small(write_corpus(tmp_path / "a"), max_val_windows=max_val_windows)
    data.setup("validate")
    windows = data.val_dataloader().dataset
    assert isinstance(windows, Windows)
    assert 1 <= len(windows) <= max_val_windows
    assert windows.stride >= data.context_length  # so no target is counted twice
    if max_val_windows >= 50:
        assert len(windows) * windows.stride > 0.7 * len(windows.split.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 0}, "data.context_length must be 1 or above, got 0"),
        ({"batch_size": -1}, "data.batch_size must be 1 or above, got -1"),
        ({"max_val_windows": 0}, "data.max_val_windows must be 1 or above, got 0"),
        ({"num_workers": -1}, "data.num_workers must be 0 or above, got -1"),
        ({"val_fraction": 0.0}, "data.val_fraction must be between 0 and 0.5, got 0.0"),
        ({"test_fraction": 0.5}, "data.test_fraction must be between 0 and 0.5, got 0.5"),
        ({"test_fraction": math.nan}, "data.test_fraction must be between 0 and 0.5, got nan"),
    ],
)
def test_sizes_out_of_range_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(tmp_path, **changes)


def test_a_source_is_either_files_or_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.dataset and data.paths are two sources; give one"):
        small(tmp_path, dataset="a/b")
    with pytest.raises(UserError, match=r"data.dataset must have a path, a folder or a hub's name, got {'name': 'a'}"):
        small(tmp_path, paths=None, dataset={"name": "a"})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_draw_what_the_training_process_would(tmp_path: Path, num_workers: int) -> None:
    data = small(write_corpus(tmp_path / "a"), num_workers=num_workers)
    if num_workers:
        assert len(pickle.dumps(data._windows("train", 1))) < 1000  # they map the text for themselves
    data.setup("validate")
    found = [batch.tolist() for batch in data.val_dataloader()]
    assert found == [batch.tolist() for batch in small(tmp_path / "a").val_dataloader()]


def test_documents_of_a_window_are_numbered_and_a_separator_begins_the_next(tmp_path: Path) -> None:
    (tmp_path / "train.tokens").write_bytes(b"abc\0d\0\0ef")
    windows = Windows(Split(tmp_path, "train", "uint8"), 8, separator=0)
    inputs, targets, document_ids = windows[1]
    assert bytes(inputs.tolist()) == b"bc\0d\0\0e"
    assert bytes(targets.tolist()) == b"c\0d\0\0ef"
    assert document_ids.tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_separate_documents_are_predicted_as_if_each_were_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = small(write_corpus(tmp_path / "a", size=20), separate_documents=True, context_length=100, val_fraction=0.4)
    data.setup("validate")
    model = LanguageModel(100, embed_dim=16, num_layers=2, num_heads=2).double().eval()
    for parameter in model.parameters():
        parameter.data *= 5  # so that what attention does shows
    inputs, targets, document_ids = next(iter(data.val_dataloader()))
    assert document_ids.max() > 1
    with torch.inference_mode():
        logits = model.predictions([inputs, targets, document_ids])[0].unflatten(0, inputs.shape)
        for row, ids in enumerate(document_ids):
            for document in ids.unique():
                alone = model(inputs[None, row, ids == document])[0]
                # Sums over up to 100 keys and 64 features in another order, in float64.
                rounding = 200 * torch.finfo(torch.float64).eps * float(logits.abs().max())
                torch.testing.assert_close(logits[row, ids == document], alone, rtol=0, atol=rounding)
        crossing = model.predictions([inputs, targets])[0].unflatten(0, inputs.shape)
    assert (crossing - logits).abs().max() > 1e-4
