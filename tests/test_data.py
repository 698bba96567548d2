"""The data: every source gives the same documents, tokens give the text back, splits and windows are what they say."""

import gzip
import json
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from tiny import in_subprocess, write_corpus

from train.data import Corpus, RandomBatches, TextData, digest
from train.errors import UserError
from train.language_model import LanguageModel
from train.sources import PIECE, Source
from train.tokens import SEPARATORS, byte_tokenizer, decode, separator, tokenizer_from, vocabulary_size

TEXTS = ["to be", "naïve\r\nπ", "a\n\nb\n"]
RECORDS = [{"text": text, "id": f"some/{i}", "number": i} for i, text in enumerate(TEXTS)]
SPLITS = ("train", "val", "test")


def source(*paths: Path, dataset: dict[str, Any] | None = None, field: str = "text", id_field: Any = None) -> Source:
    return Source(None if dataset else tuple(map(str, paths)), dataset, field, id_field)


def documents(*paths: Path, **options: Any) -> list[tuple[str, str]]:
    found, text = [], ""
    for row in source(*paths, **options).rows():
        text += row["text"]
        if row["last"]:
            found.append((row["name"], text))
            text = ""
    assert text == ""
    return found


def write(path: Path, content: bytes) -> Path:
    """The content in a file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


def write_records(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    return write(path, b"".join(json.dumps(record).encode() + b"\n" for record in records))


def test_a_folder_or_pattern_gives_its_files_but_hidden_ones_and_counts_what_is_no_text(tmp_path, capsys):
    for name in ("x.txt", "b/y.txt", "b/z.md", ".git/t.txt", ".hidden"):
        write(tmp_path / "a" / name, name.encode())
    late = b"a" * 2 * PIECE + b"\xef"
    no_text = {"latin": b"na\xefve", "empty": b"", "nul": b"a\0b", "late": late, "utf16": "a".encode("utf-16")}
    for name, content in no_text.items():
        write(tmp_path / "a" / name, content)
    (tmp_path / "a" / "broken").symlink_to("nowhere")
    assert [name for name, _ in documents(tmp_path / "a")] == ["b/y.txt", "b/z.md", "x.txt"]
    expected = f"data.paths: files without UTF-8 text left out: 5, such as {tmp_path / 'a' / 'broken'}\n"
    assert capsys.readouterr().err == expected
    assert [name for name, _ in documents(tmp_path / "a" / "**" / "*.txt")] == ["b/y.txt", "x.txt"]
    assert [name for name, _ in documents(tmp_path / "*" / "b" / "*.md")] == ["a/b/z.md"]
    assert [name for name, _ in documents(tmp_path / "a" / "?" / "[z].md")] == ["b/z.md"]
    assert [name for name, _ in documents(tmp_path / "*" / ".git" / "**")] == ["a/.git/t.txt"]
    assert [name for name, _ in documents(tmp_path / "a" / "b" / "z.md")] == ["z.md"]
    assert capsys.readouterr().err == ""
    for path, message in {
        "*.rst": r"there is no file or folder '.*\*\.rst'",
        "**.txt": r"\*\* must be a whole part of a path, as in \*\*/\*\.txt, got '\*\*\.txt'",
        "a/latin": "latin is no text in UTF-8",
        "a/broken": "broken is no text in UTF-8: it is no file",
    }.items():
        with pytest.raises(UserError, match=message):
            documents(tmp_path / path)


@pytest.mark.parametrize(
    ("named", "neighbour"),
    [
        ("part[1].jsonl", "part1.jsonl"),
        ("what?.jsonl", "whats.jsonl"),
        ("*.txt", "a.txt"),
        ("*", "a"),
        ("**", "a"),
        ("[a]", "a"),
    ],
)
def test_a_path_that_exists_is_no_pattern(named, neighbour, tmp_path):
    for name in (named, neighbour):
        write_records(tmp_path / "files" / name, [{"text": name}])
        write(tmp_path / "folders" / name / "x.txt", name.encode())
    (text,) = (text for _, text in documents(tmp_path / "files" / named))
    assert named in text
    assert sorted(text for _, text in documents(tmp_path / "files")) == sorted([text, text.replace(named, neighbour)])
    assert documents(tmp_path / "folders" / named) == [("x.txt", named)]
    assert documents(tmp_path / "folders" / named / "*.txt") == [("x.txt", named)]
    assert (f"folders/{named}/x.txt", named) in documents(tmp_path / "*" / named / "x.txt")


def test_a_file_that_is_reached_in_several_ways_is_one_document_whatever_their_order(tmp_path):
    write_corpus(tmp_path / "a" / "b", files=5)
    write_corpus(tmp_path / "c", files=1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    paths = [tmp_path / name for name in ("a", "a/b", "a/b/3.txt", "a/../a", "link", "c", "c")]
    found = documents(*paths)
    assert sorted(name for name, _ in found) == ["0.txt", *(f"b/{i}.txt" for i in range(5))]
    for seed in range(5):
        Random(seed).shuffle(paths)
        assert documents(*paths) == found


def test_links_are_followed_once_even_in_loops_and_rename_nothing(tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "z.txt", b"z")
    write(tmp_path / "blobs" / "abc", b'{"text": "r"}')
    for name in ("b/x.txt", "y.txt"):
        write(tmp_path / "a" / name, name.encode())
    before = documents(tmp_path / "a")
    links = {"0": "b", "loop": ".", "b/up": "..", "top": "..", "self": "self", "0.txt": "y.txt", "l": "../elsewhere"}
    for link, target in (links | {"../elsewhere/deep/back": "../../a", "r.jsonl": "../blobs/abc"}).items():
        (tmp_path / "a" / link).symlink_to(target)
    expected = sorted([*before, ("l/deep/z.txt", "z"), ("r.jsonl/1", "r")])
    assert documents(tmp_path / "a") == documents(tmp_path / "a" / "**") == expected
    assert documents(tmp_path / "a" / "**" / "*.txt") == [row for row in expected if "jsonl" not in row[0]]
    assert documents(tmp_path / "a" / "r.jsonl") == [("r.jsonl/1", "r")]
    for i in range(12):  # each linked from all others
        write(tmp_path / "many" / str(i) / "x", b"x")
        for j in range(12):
            (tmp_path / "many" / str(i) / f"to{j}").symlink_to(f"../{j}")
    assert documents(tmp_path / "many") == sorted((f"{i}/x", "x") for i in range(12))


@pytest.mark.parametrize(("suffix", "end"), [("", "\n"), ("", ""), (".gz", "\r\n"), (".zst", "\n")])
def test_a_long_file_comes_in_pieces_that_are_its_text(end, suffix, tmp_path):
    text = f"π not to be{end}" * (3 * PIECE // 10)
    path = write(tmp_path / f"long.txt{suffix}", text.encode())
    rows = list(source(path).rows())
    assert len(rows) >= 3
    assert "".join(row["text"] for row in rows) == text
    assert [row["last"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert {row["name"] for row in rows} == {"long.txt"}
    assert max(len(row["text"]) for row in rows) < 2 * PIECE
    assert all(row["text"].endswith(end) for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.jsonl.zst", "a.parquet", "a.JSONL", "a.JSONL.GZ"])
def test_each_record_of_a_file_is_a_document(name, tmp_path):
    path = write_records(tmp_path / name, [*RECORDS, {"text": "", "id": "some/empty", "number": 3}])
    named = name.removesuffix(".gz").removesuffix(".zst").removesuffix(".GZ")
    assert documents(path) == [(f"{named}/{i}", text) for i, text in enumerate(TEXTS, 1)]
    assert documents(path, id_field="id") == [(f"some/{i}", text) for i, text in enumerate(TEXTS)]
    assert [text for _, text in documents(path, field="id")][:3] == ["some/0", "some/1", "some/2"]


def write_odd_parquet(path: Path) -> Path:
    """One record whose text is b, and columns that `datasets` cannot type."""
    pairs, uuids = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), pa.array([bytes(16)], pa.uuid())
    pq.write_table(pa.table({"a": pairs, "text": ["b"], "u": uuids}), path)
    return path


def test_fields_that_do_not_count_may_be_anything(tmp_path):
    others = [{}, {"x": 1}, {"x": [{"y": None}, "z"]}, {"x": {"": 1.5}, "z": "a" * 2**20}]
    path = write_records(tmp_path / "a.jsonl", [{"text": f"{i}"} | others[i % 4] for i in range(60)])
    assert [text for _, text in documents(path)] == [f"{i}" for i in range(60)]
    assert documents(write_odd_parquet(tmp_path / "b.parquet")) == [("b.parquet/1", "b")]


NUMBERS = [pa.int8(), pa.uint64(), pa.float64(), pa.decimal128(5, 2)]
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]


def test_ids_and_texts_are_the_same_in_columns_of_any_type(tmp_path):
    for ids in ([7, 8], [7.0, 8.0], ["7", "8"]):
        path = write_records(tmp_path / "a.jsonl", [{"text": "a", "id": i} for i in ids])
        assert documents(path, id_field="id") == [("7", "a"), ("8", "a")]
    for kind in [*NUMBERS, *STRINGS]:
        ids = pa.array([7, 8], pa.int8()) if kind in NUMBERS else pa.array(["7", "8"])
        texts = pa.array(["a", "π"]).cast(pa.string() if kind in NUMBERS else kind)
        pq.write_table(pa.table({"text": texts, "id": ids.cast(kind)}), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet", id_field="id") == [("7", "a"), ("8", "π")], kind
    path = write_records(tmp_path / "dates.jsonl", [{"text": "a", "id": "2020-01-01"}])
    assert documents(path, id_field="id") == [("2020-01-01", "a")]


def test_what_is_empty_stands_in_nobodys_way_and_records_without_text_are_counted(tmp_path, capsys):
    folder = tmp_path / "a"
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"):
        write(folder / name, b"")
    (folder / "b.txt.gz").write_bytes(b"")
    write(folder / "blank.jsonl", b"\n \r\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "rows.parquet")
    pq.write_table(pa.table({"other": pa.array([], pa.null())}), folder / "other.parquet")
    write(folder / "bom.txt", "\ufeffa".encode())
    assert documents(folder) == [("bom.txt", "a")]
    assert capsys.readouterr().err == ""
    records = (
        '\ufeff{"text": "a"}\r\n\n{"text": null}\r\n{"id": 3}\n{"text": "a\\u0000"}\n{"text": ""}\n{"text": "f"}\n\n'
    )
    path = write(tmp_path / "b.jsonl", records.encode())
    assert documents(path) == [("b.jsonl/1", "a"), ("b.jsonl/6", "f")]
    expected = f"data.paths: records without UTF-8 text left out: 3, such as {path}, line 3\n"
    assert capsys.readouterr().err == expected


def test_each_row_of_a_data_set_is_a_document(tmp_path):
    rows = datasets.Dataset.from_list(RECORDS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    write_records(tmp_path / "folder" / "train.jsonl", RECORDS)
    for name in ("saved", "splits", "folder"):
        found = documents(dataset={"path": str(tmp_path / name)})
        assert found == [(str(i), text) for i, text in enumerate(TEXTS, 1)]
    (tmp_path / "map").mkdir()
    write_odd_parquet(tmp_path / "map" / "a.parquet")
    with pytest.raises(UserError, match=r"data.dataset: .*map cannot be read: Arrow type map"):
        documents(dataset={"path": str(tmp_path / "map")})


def test_a_data_set_of_a_hub_is_streamed_unless_said_otherwise(monkeypatch):
    asked: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> list[dict[str, str]]:
        asked.append(options)
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents(dataset={"path": "some/set"})
    documents(dataset={"path": "some/set", "streaming": False, "split": "all"})
    assert [(options["streaming"], options["split"]) for options in asked] == [(True, "train"), (False, "all")]


@cache
def learned(*special: str) -> tokenizers.Tokenizer:
    """A small byte pair encoding, as docs/data.md learns one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["to be or not to be"] * 50, trainer)
    return tokenizer


@given(st.text(max_size=40))
def test_byte_tokens_are_the_bytes_and_every_tokenizer_gives_its_text_back(text):
    assert byte_tokenizer().encode(text).ids == list(text.encode())
    for tokenizer in (byte_tokenizer(), tokenizer_from(learned().to_str())):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(decode(tokenizer, ids)) == text
        assert all(token < vocabulary_size(tokenizer) for token in ids)
    assert "".join(decode(byte_tokenizer(), [0xFF, 65, 0xE6, 66])) == "�A�B"


@pytest.mark.parametrize(
    ("special", "expected"), [((), SEPARATORS[0]), (("<eos>",), "<eos>"), (("[PAD]", "</s>", "<eos>"), "</s>")]
)
def test_any_tokenizer_has_a_separator_which_no_text_reads_like(special, expected):
    tokenizer = tokenizer_from(learned(*special).to_str())
    token = separator(tokenizer)
    assert token == tokenizer.token_to_id(expected)
    assert token not in tokenizer.encode(f"to {expected} be", add_special_tokens=False).ids
    assert separator(byte_tokenizer()) == 0


def text_data(folder: Path | None, cache: Path, **options: Any) -> TextData:
    shares = {"val_fraction": 0.2, "test_fraction": 0.2}
    paths = None if folder is None else [str(folder)]
    given: dict[str, Any] = {"context_length": 16, "paths": paths, "cache": str(cache)} | shares | options
    return TextData(**given)


def split_of(name: str) -> str:
    place = digest(name) / 2**56
    return "test" if place < 0.2 else "val" if place < 0.4 else "train"


def content(corpus: Corpus) -> dict[str, dict[str, bytes]]:
    return {split: {d.name: d.tokens.tobytes() for d in corpus.splits[split]} for split in SPLITS}


def test_every_split_holds_its_documents_in_the_order_of_their_names(tmp_path):
    folder = write_corpus(tmp_path / "a")
    corpus = text_data(folder, tmp_path / "cache").corpus
    for name in SPLITS:
        split = corpus.splits[name]
        expected = [path.name for path in sorted(folder.iterdir()) if split_of(path.name) == name]
        assert [document.name for document in split] == expected
        assert all(bytes(document.tokens) == (folder / document.name).read_bytes() for document in split)
        row = b"".join((folder / name).read_bytes() + b"\0" for name in expected)
        assert (split.size, split.tokens_per_byte) == (len(row), 1.0)
        rng = Random(0)
        for _ in range(50):
            start = rng.randrange(len(row))
            length = rng.randint(1, len(row) - start)
            assert bytes(split.read(start, length)) == row[start : start + length]


@pytest.mark.parametrize("files", [1, 2])
def test_too_few_documents_are_cut_and_no_token_is_in_two_splits(files, tmp_path):
    corpus = text_data(write_corpus(tmp_path / "a", files), tmp_path / "cache").corpus
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        parts = [bytes(corpus.splits[name][i].tokens) for name in SPLITS]
        assert b"".join(parts) == path.read_bytes()
        assert [round(len(part) / path.stat().st_size, 2) for part in parts] == [0.6, 0.2, 0.2]
    assert sum(corpus.splits[name].size for name in SPLITS) == len(corpus.tokens)


def test_of_a_document_too_short_to_be_cut_no_token_is_lost(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a", files=1)
    (folder / "short.txt").write_text("a")
    corpus = text_data(folder, tmp_path / "cache").corpus
    parts = [bytes(document.tokens) for name in SPLITS for document in corpus.splits[name] if "short" in document.name]
    assert sorted(parts) == [b"", b"", b"a"]


def test_all_of_an_outermost_folder_is_held_out_together(tmp_path):
    for i in range(30):
        write_corpus(tmp_path / "a" / f"package{i}", files=2, size=8)
    corpus = text_data(tmp_path / "a", tmp_path / "cache", split_by="folder").corpus
    for name in SPLITS:
        assert {split_of(document.name.split("/")[0]) for document in corpus.splits[name]} == {name}


def test_holding_out_more_for_validation_never_uses_a_test_document(tmp_path):
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    names = [
        {name: {d.name for d in text_data(folder, cache, val_fraction=fraction).documents(name)} for name in SPLITS}
        for fraction in (0.2, 0.4)
    ]
    assert names[0]["test"] == names[1]["test"]
    assert names[0]["val"] < names[1]["val"]


def test_a_split_is_known_by_a_hash_of_its_text_whatever_the_tokenizer(tmp_path):
    folder, path = write_corpus(tmp_path / "a"), tmp_path / "tokenizer.json"
    learned().save(str(path))

    def hashes(**options: Any) -> list[str]:
        return [text_data(folder, tmp_path / "cache", **options).documents(split).text_sha256 for split in SPLITS]

    def differ(**options: Any) -> set[str]:
        """The splits whose text is not what it was."""
        return {name for name, was, now in zip(SPLITS, before, hashes(**options), strict=True) if was != now}

    before = hashes()
    assert len(set(before)) == 3
    assert differ(tokenizer=str(path)) == set()
    assert differ(val_fraction=0.3) == {"train", "val"}
    for split in SPLITS:
        changed = next(folder / name for name in (f"{i}.txt" for i in range(40)) if split_of(name) == split)
        before, text = hashes(), changed.read_text()
        changed.write_text("more\n" + text)
        assert differ() == {split}
    name = next(f"new{i}.txt" for i in range(40) if split_of(f"new{i}.txt") == "train")
    before = hashes()
    (folder / name).write_text("new")
    assert differ() == {"train"}
    folder = write_corpus(tmp_path / "one", files=1)  # whose end is held out
    before = hashes()
    assert differ(val_fraction=0.3) == {"train", "val"}
    (folder / "0.txt").write_text("more\n" + (folder / "0.txt").read_text())
    assert differ() == set(SPLITS)


def test_the_default_corpus_is_the_standard_library_without_packages_and_tests():
    names = list(Source(None, None, "text", None).files.values())
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]


CHANGES: dict[str, Callable[[Path], Any]] = {
    "another text": lambda folder: (folder / "3.txt").write_text("quite another text"),
    "as many bytes": lambda folder: (folder / "3.txt").write_text((folder / "3.txt").read_text().replace("to", "ot")),
    "one more": lambda folder: (folder / "new.txt").write_text("new"),
    "one less": lambda folder: (folder / "3.txt").unlink(),
    "another name": lambda folder: (folder / "3.txt").rename(folder / "new.txt"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_text_is_tokenised_once_and_anew_when_it_has_changed(change, tmp_path, monkeypatch):
    folder, cache, calls = write_corpus(tmp_path / "a"), tmp_path / "cache", []
    before = text_data(folder, cache).state_dict()["text_sha256"]
    rows = Source.rows
    monkeypatch.setattr(Source, "rows", lambda self: calls.append(self) or rows(self))
    assert text_data(folder, cache).state_dict()["text_sha256"] == before
    assert not calls
    change(folder)
    changed = text_data(folder, cache)
    assert changed.state_dict()["text_sha256"] != before
    assert content(changed.corpus) == content(text_data(folder, tmp_path / "other").corpus)


def test_another_tokenizer_has_tokens_of_its_own(tmp_path):
    folder, path = write_corpus(tmp_path / "a"), tmp_path / "tokenizer.json"
    learned().save(str(path))
    of_bytes, of_words = (text_data(folder, tmp_path / "cache", tokenizer=t) for t in ("bytes", str(path)))
    assert of_words.unit == "token"
    assert of_words.vocab_size == of_words.tokenizer.get_vocab_size(with_added_tokens=True)
    for name in SPLITS:
        texts = ["".join(decode(of_words.tokenizer, d.tokens.tolist())) for d in of_words.documents(name)]
        assert texts == [bytes(d.tokens).decode() for d in of_bytes.documents(name)]
        ratio = of_words.documents(name).size / of_bytes.documents(name).size
        assert of_words.tokens_per_byte(name) == pytest.approx(ratio)


def test_a_cache_that_was_cut_short_is_told_in_one_line(tmp_path):
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    _ = text_data(folder, cache).corpus
    for path in cache.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"data.cache: {cache} is damaged; remove it"):
        _ = text_data(folder, cache).corpus


KILLED = """
import os, signal, sys
from train.data import TextData
from train.sources import Source
rows = Source.rows
def killed(self):
    for i, row in enumerate(rows(self)):
        if i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
Source.rows = killed
TextData(16, paths=[sys.argv[1]], cache=sys.argv[2]).corpus
"""
PEAK = """
import sys
from train.data import TextData
from train.tokens import byte_tokenizer
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon"))) // 1024
TextData(16, paths=[sys.argv[2]], cache=sys.argv[3]).corpus
before = peak()
corpus = TextData(16, paths=[sys.argv[1]], cache=sys.argv[3]).corpus
print(peak() - before, corpus.splits["train"].size >> 20)
"""


@pytest.mark.slow
def test_a_tokenisation_that_was_killed_is_made_anew(tmp_path):
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    assert in_subprocess("-c", KILLED, folder, cache).returncode == -9
    assert content(text_data(folder, cache).corpus) == content(text_data(folder, tmp_path / "other").corpus)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_while_a_large_file_is_tokenised(tmp_path):
    for name, megabytes in (("large", 100), ("small", 5)):
        text = "to be or not to be, that is the question\n" * (megabytes * 2**20 // 41)
        write(tmp_path / name / "a.txt", text.encode())
    done = in_subprocess("-c", PEAK, tmp_path / "large", tmp_path / "small", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size > 70
    assert grown < size  # what a few rows take, whatever the size


@given(st.integers(0, 1000), st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_a_batch_depends_on_seed_step_and_rank_alone(first, seed, rank):
    whole = list(RandomBatches(10**6, 4, 0, first + 2, seed, rank))
    assert list(RandomBatches(10**6, 4, first, first + 2, seed, rank)) == whole[first:]
    others = [(seed + 1, rank), (seed, rank + 1)]
    assert all(list(RandomBatches(10**6, 4, first, first + 2, *other)) != whole[first:] for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_windows_are_pieces_of_the_text_whoever_loads_them(workers, tmp_path):
    data = text_data(write_corpus(tmp_path / "a"), tmp_path / "cache", num_workers=workers, batch_size=3)
    data.trainer = Trainer(max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    batches = list(data.train_dataloader())
    expected = list(RandomBatches(data.documents("train").size - 16, 3, 0, 4, 1, 0))
    for batch, starts in zip(batches, expected, strict=True):
        for window, start in zip(batch, starts, strict=True):
            assert window.tolist() == data.documents("train").read(start, 17).tolist()


@pytest.mark.parametrize("most", [1, 5, 10**6])
def test_validation_windows_do_not_overlap_and_are_at_most_as_many_as_said(most, tmp_path):
    data = text_data(write_corpus(tmp_path / "a"), tmp_path / "cache", max_val_windows=most)
    windows = torch.cat(list(data.val_dataloader()))
    split = data.documents("val")
    stride = max(16, -(-(split.size - 16) // most))
    assert len(windows) == min(most, (split.size - 17) // stride + 1)
    for i, window in enumerate(windows):
        assert window.tolist() == split.read(i * stride, 17).tolist()


def test_separate_documents_are_predicted_as_if_each_were_alone(tmp_path):
    folder = write_corpus(tmp_path / "a", files=100, size=10)
    data = text_data(folder, tmp_path / "cache", context_length=64, separate_documents=True)
    inputs, targets, ids = (part[:2] for part in next(iter(data.val_dataloader())))
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    torch.manual_seed(0)
    model = LanguageModel(64, embed_dim=16, num_layers=1, num_heads=2).double().eval()
    logits = model(inputs, ids)
    starts = [0, *(int(i) for i in (inputs[0] == 0).nonzero() if i), 64]
    assert len(starts) > 3
    for start, stop in pairwise(starts):
        torch.testing.assert_close(logits[:1, start:stop], model(inputs[:1, start:stop]), rtol=1e-9, atol=1e-12)
