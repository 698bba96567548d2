"""Where text comes from: every kind of file and data set gives the same documents, and one line says what is wrong."""

import gzip
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_corpus

from train.errors import UserError
from train.sources import PIECE, Fields, Source, text_files, text_pieces

TEXTS = ["to be", "naïve\r\nπ", "a\n\nb\n"]
RECORDS = [{"text": text, "id": f"some/{i}", "number": i} for i, text in enumerate(TEXTS)]


def documents(
    *paths: Path, dataset: dict[str, Any] | None = None, field: str = "text", id_field: str | None = None
) -> list[tuple[str, str]]:
    source = Source(None if dataset else [str(path) for path in paths], dataset, Fields(field, id_field))
    return [(name, "".join(pieces)) for name, pieces in source.documents()]


def write(path: Path, content: bytes) -> Path:
    """The content in a file, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


def write_records(path: Path, records: list[Any] = RECORDS) -> Path:
    """JSON lines, Parquet, or one of the two forms in which `datasets` keeps a set on disk."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".saved":
        datasets.Dataset.from_list(records).save_to_disk(path)
    elif path.suffix == ".splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(path)
    elif path.suffix == ".folder":
        write_records(path / "train.jsonl", records)
    else:
        write(path, b"".join(json.dumps(record).encode() + b"\n" for record in records))
    return path


# --- files -----------------------------------------------------------------------------------------------------------


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
    names = [name for name, _ in documents(*map(Path, overlapping(tmp_path)))]
    assert sorted(names) == sorted([*(f"b/{i}.txt" for i in range(20)), *["0.txt"] * 2])


@given(st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_paths(
    tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    folder = tmp_path_factory.mktemp("order")
    paths = overlapping(folder)
    expected = documents(*map(Path, paths))
    random.shuffle(paths)
    assert documents(*map(Path, paths)) == expected


NO_TEXT = {"latin": b"na\xefve", "empty": b"", "nul": b"a\0b", "late": b"a" * 2 * PIECE + b"\xef"}


def test_files_in_folders_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    for name, content in ({"good": "naïve".encode()} | NO_TEXT).items():
        (tmp_path / name).write_bytes(content)
    assert documents(tmp_path) == [("good", "naïve")]


@pytest.mark.parametrize(("name", "said"), [("latin", "unexpected end of data 0xef"), ("nul", "it holds a NUL")])
def test_a_file_that_is_named_must_be_text(name: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, NO_TEXT[name].replace(b"ve", b""))
    with pytest.raises(UserError, match=f"data.paths: .*{name} is no text in UTF-8: {said}"):
        documents(path)


@pytest.mark.parametrize(
    "line", ["naïve π" * 9 + "\n", "no line ends π", "\n"], ids=["lines", "one line", "empty lines"]
)
def test_a_long_file_comes_in_pieces_that_end_with_a_line(line: str, tmp_path: Path) -> None:
    text = line * (3 * PIECE // len(line))
    pieces = list(text_pieces(write(tmp_path / "long", text.encode())))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert "\n" not in line or all(piece.endswith("\n") for piece in pieces)
    assert max(len(piece.encode()) for piece in pieces) < PIECE + 100


def test_a_file_of_one_piece_is_whole(tmp_path: Path) -> None:
    assert list(text_pieces(write(tmp_path / "short", b"a\nb"))) == ["a\nb"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_is_the_document_that_it_was(suffix: str, tmp_path: Path) -> None:
    plain = write_corpus(tmp_path / "plain", files=3, size=PIECE // 2)
    for path in plain.iterdir():
        write(tmp_path / "packed" / f"{path.name}{suffix}", path.read_bytes())
    assert documents(tmp_path / "packed") == documents(plain)


def test_all_that_is_read_is_reported(tmp_path: Path) -> None:
    write_records(tmp_path / "a.parquet")
    write_records(tmp_path / "b.jsonl.gz")
    write(tmp_path / "c", b"c" * 2 * PIECE)
    write(tmp_path / "d", b"\xff\xff")
    write(tmp_path / "e.zst", b"e" * PIECE)
    source, reported = Source([str(tmp_path)], None, Fields("text", None)), []
    for _, pieces in source.documents(reported.append):
        list(pieces)
    assert sum(reported) == source.size()


# --- records ---------------------------------------------------------------------------------------------------------

RECORD_FILES = ("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")
DATASETS = ("a.saved", "a.splits", "a.folder")


@pytest.mark.parametrize("name", RECORD_FILES)
def test_each_record_of_a_file_is_a_document(name: str, tmp_path: Path) -> None:
    path = write_records(tmp_path / name)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    assert documents(path) == [(f"{plain}/{i}", text) for i, text in enumerate(TEXTS, 1)]
    assert documents(tmp_path, id_field="id") == [(f"some/{i}", text) for i, text in enumerate(TEXTS)]
    assert documents(path, field="id", id_field="number") == [(str(i), f"some/{i}") for i in range(len(TEXTS))]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        pytest.fail(f"network access: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.usefixtures("offline")
def test_each_row_of_a_data_set_is_a_document(name: str, tmp_path: Path) -> None:
    options = {"path": str(write_records(tmp_path / name))}
    assert documents(dataset=options) == [(str(i), text) for i, text in enumerate(TEXTS, 1)]
    assert documents(dataset=options, id_field="id") == [(f"some/{i}", text) for i, text in enumerate(TEXTS)]


def test_a_data_set_is_streamed_unless_it_is_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: calls.append(options) or [])
    documents(dataset={"path": "a/b"})
    documents(dataset={"path": "a/b", "name": "c", "split": "test", "streaming": False})
    assert calls == [
        {"path": "a/b", "split": "train", "streaming": True},
        {"path": "a/b", "name": "c", "split": "test", "streaming": False},
    ]


def test_a_change_of_a_file_that_a_data_set_names_is_noticed(tmp_path: Path) -> None:
    file = write_records(tmp_path / "some" / "a.jsonl")
    named: list[dict[str, Any]] = [
        {"path": "json", "data_files": str(file)},
        {"path": "json", "data_files": {"train": [f"{tmp_path}/*/*.jsonl"]}},
        {"path": "json", "data_dir": str(file.parent)},
        {"path": str(tmp_path), "data_files": "some/*"},
        {"path": str(tmp_path)},
    ]
    sources = [Source(None, options, Fields("text", None)) for options in named]
    before = [source.state() for source in sources]
    write_records(file, RECORDS[:1])
    assert all(was != source.state() for was, source in zip(before, sources, strict=True))


def test_records_without_text_are_left_out_and_half_characters_replaced(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "", None, "b\0", "\ud800c")])
    assert documents(path) == [("a.jsonl/1", "a"), ("a.jsonl/5", "?c")]


# --- bad input -------------------------------------------------------------------------------------------------------


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such path": (lambda d: documents(d / "no"), "data.paths: there is no file or folder '.*no'"),
    "an empty folder": (lambda d: documents(d), "data.paths: there is no file in "),
    "gz cut short": (
        lambda d: documents(cut(write(d / "a.gz", b"text"))),
        "data.paths: .*a.gz cannot be read: Compressed file ended before",
    ),
    "no gz": (
        lambda d: documents(write(d / "a", b"text").rename(d / "a.gz")),
        "data.paths: .*a.gz cannot be read: Not a gzipped file",
    ),
    "zst cut short": (
        lambda d: documents(cut(write(d / "a.zst", b"text" * 99))),
        "data.paths: .*a.zst cannot be read: Truncated compressed stream",
    ),
    "no zst": (
        lambda d: documents(write(d / "a", b"text").rename(d / "a.zst")),
        "data.paths: .*a.zst cannot be read: ZSTD decompress failed",
    ),
    "no JSON": (
        lambda d: documents(write(d / "a.jsonl", b'{"text": "a"}\n\n{"text": ')),
        "data.paths: .*a.jsonl, line 3, is no JSON in UTF-8: Expecting value",
    ),
    "JSON in another encoding": (
        lambda d: documents(write(d / "a.jsonl", b'{"text": "na\xefve"}')),
        "data.paths: .*a.jsonl, line 1, is no JSON in UTF-8: .* can't decode byte 0xef",
    ),
    "a list": (
        lambda d: documents(write(d / "a.jsonl", b"[1]")),
        "data.paths: .*a.jsonl, line 1, must be a JSON object, got list",
    ),
    "a field that is missing": (
        lambda d: documents(write_records(d / "a.jsonl"), field="body"),
        "data.field: .*a.jsonl, line 1, has no 'body', but 'text', 'id', 'number'",
    ),
    "a column that is missing": (
        lambda d: documents(write_records(d / "a.parquet"), id_field="name"),
        "data.id_field: .*a.parquet, row 1, has no 'name', but 'text', 'id', 'number'",
    ),
    "a field that is no text": (
        lambda d: documents(write_records(d / "a.jsonl"), field="number"),
        "data.field: 'number' must be text, .*a.jsonl, line 1, has int there",
    ),
    "Parquet cut short": (
        lambda d: documents(cut(write_records(d / "a.parquet"))),
        "data.paths: .*a.parquet cannot be read: Parquet magic bytes not found",
    ),
    "no such split": (
        lambda d: documents(dataset={"path": str(write_records(d / "a.folder")), "split": "tset"}),
        "data.dataset: .*a.folder cannot be read: .*tset",
    ),
    "no such saved split": (
        lambda d: documents(dataset={"path": str(write_records(d / "a.splits")), "split": "tset"}),
        "data.dataset: .*a.splits cannot be read: .*tset",
    ),
    "all splits": (
        lambda d: documents(dataset={"path": str(write_records(d / "a.folder")), "split": None}),
        "data.dataset: give a split, one of train",
    ),
    "a data set without the field": (
        lambda d: documents(dataset={"path": str(write_records(d / "a.saved"))}, field="body"),
        "data.field: .*a.saved, row 1, has no 'body', but 'text', 'id', 'number'",
    ),
}


@pytest.mark.parametrize(("read", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_source_is_named(read: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.parquet", "pyarrow.parquet", "pyarrow"),
        ("a.jsonl.zst", "pyarrow", "pyarrow"),
        ("a.saved", "datasets", "datasets"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {package}, which is missing: pip install {package}$"):
        documents(path, dataset={"path": str(path)} if name in DATASETS else None)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "a", files=3)

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("train.sources.Reported", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"data.paths: .*0.txt cannot be read: Permission denied"):
        documents(corpus)
