"""Text as data: what is read, how it is split, and which windows are drawn from it."""

import itertools
import math
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_corpus

from train.errors import UserError
from train.text import (
    NOT_SOURCE,
    RandomBatches,
    TextData,
    Windows,
    read_documents,
    split_of,
    standard_library,
    text_files,
)


def small(corpus: Path, **changes) -> TextData:
    return TextData(**{"context_length": 16, "paths": [str(corpus)], "batch_size": 2} | changes)


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


def test_the_default_corpus_is_the_standard_library_without_packages_and_tests() -> None:
    files = set(standard_library().values())
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= files
    assert not [name for name in files if NOT_SOURCE & set(name.split("/"))]
    assert not [name for name in files if "site-packages" in name or "/test/" in name or name.startswith("test/")]
    data = TextData(context_length=128)
    longest = 64 * 128 + 1  # the farthest that `make demo` looks
    assert sum(len(document.tokens) >= longest for document in data.documents("test")) >= 8
    assert sum(len(document.tokens) for document in data.documents("train")) > 5_000_000


def test_hidden_files_are_left_out_and_equal_names_are_kept_apart(tmp_path: Path) -> None:
    for name in ("a/x.txt", "b/x.txt", "a/.git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = text_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert sorted(path.read_text() for path in files) == ["a/x.txt", "b/x.txt"]
    assert text_files([str(tmp_path / "a" / "x.txt")]) == {tmp_path / "a" / "x.txt": "x.txt"}


def test_a_pattern_chooses_files_which_are_named_from_its_first_star_on(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/b/y.txt", "a/b/z.md", "a/.git/t.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = text_files([str(tmp_path / "a" / "**" / "*.txt")])
    assert files == {tmp_path / "a" / "x.txt": "x.txt", tmp_path / "a" / "b" / "y.txt": "b/y.txt"}
    assert list(text_files([str(tmp_path / "*" / "b" / "*.md")]).values()) == ["a/b/z.md"]
    with pytest.raises(UserError, match=r"there is no file in '.*\*\.rst'"):
        text_files([str(tmp_path / "*.rst")])


@given(st.lists(st.text("ab./-", min_size=1, max_size=8), min_size=1, max_size=4))
def test_split_by_folder_keeps_all_of_an_outermost_folder_together(parts: list[str]) -> None:
    folder, *below = [part.replace("/", "") + "x" for part in parts]
    name = "/".join((folder, *below))
    assert split_of(name, 0.3, 0.3, "folder") == split_of(f"{folder}/other", 0.3, 0.3, "folder")
    assert split_of(name, 0.3, 0.3, "folder") == split_of(folder, 0.3, 0.3, "file")


def overlapping(tmp_path: Path) -> list[str]:
    """A folder, its subfolder, a file of that, the folder by a link, and another folder with a file of equal name."""
    write_corpus(tmp_path / "a" / "b", files=20)
    write_corpus(tmp_path / "c", files=1)
    write_corpus(tmp_path / "d", files=1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "alias").symlink_to(tmp_path / "d" / "0.txt")
    names = ("a", "a/b", "a/b/3.txt", "a/../a", "link", "c", "c", "d/0.txt", "alias")
    return [str(tmp_path / name) for name in names]


def test_a_file_that_is_reached_in_several_ways_is_one_document(tmp_path: Path) -> None:
    documents = read_documents(overlapping(tmp_path))
    assert sorted(document.name for document in documents) == sorted(
        [*(f"b/{i}.txt" for i in range(20)), *["0.txt"] * 2]
    )


@given(st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_paths(
    tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    folder = tmp_path_factory.mktemp("order")
    paths = overlapping(folder)
    expected = read_documents(paths)
    random.shuffle(paths)
    found = read_documents(paths)
    assert [document.name for document in found] == [document.name for document in expected]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    for name, content in {"good": "naïve".encode(), "latin": b"na\xefve", "empty": b"", "nul": b"a\0b"}.items():
        (tmp_path / name).write_bytes(content)
    (document,) = read_documents([str(tmp_path)])
    assert document.name == "good"
    assert bytes(document.tokens.tolist()) == "naïve".encode()


def test_training_text_is_every_document_with_a_separator_after_it(tmp_path: Path) -> None:
    data = small(write_corpus(tmp_path / "a"))
    data.setup("fit")
    documents = data.documents("train")
    text = data._windows("train", stride=1).tokens
    assert bytes(text.tolist()) == b"".join(bytes(d.tokens.tolist()) + b"\0" for d in documents)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 12))
def test_windows_are_all_that_fit(size: int, length: int, stride: int) -> None:
    windows = Windows(torch.arange(size, dtype=torch.uint8), length, stride)
    expected = [list(range(start, start + length)) for start in range(0, size, stride) if start + length <= size]
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    assert all(windows[i].dtype == torch.int64 for i in range(len(windows)))


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
        assert len(windows) * windows.stride > 0.7 * len(windows.tokens)


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


def test_no_paths_at_all_are_not_the_standard_library(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file with UTF-8 text in \[\]"):
        read_documents([])


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "a", files=3)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"data.paths: .*0.txt cannot be read: Permission denied"):
        read_documents([str(corpus)])
