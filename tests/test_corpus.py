"""The tokenised corpus: it is what the source holds, made once, made anew when that changes, and never half made."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIGS, InterruptionError, write_corpus

from train import corpus as module
from train.corpus import SPLITS, Corpus, Request
from train.errors import UserError
from train.sources import Fields, Source
from train.text import split_of
from train.tokens import Bytes

SHARES: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.2, "split_by": "file"}


def request(folder: Path, **changes: Any) -> Request:
    source = Source([str(folder)], None, Fields("text", None))
    return replace(Request(source, Bytes(), lambda name: split_of(name, **SHARES), SHARES), **changes)


def content(corpus: Corpus) -> dict[str, dict[str, bytes]]:
    return {split: {d.name: bytes(d.tokens) for d in corpus.split(split)} for split in SPLITS}


class Counted(Bytes):
    """Counts the texts that it makes tokens of, and fails at one of them."""

    def __init__(self, fail_at: int | None = None):
        self.count, self.fail_at = 0, fail_at

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        self.count += len(texts)
        if self.fail_at is not None and self.count > self.fail_at:
            raise InterruptionError
        return super().encode(texts)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1000)


def test_every_split_holds_its_documents_in_the_order_of_the_source(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a")
    corpus = request(folder).corpus(tmp_path / "cache")
    for split in SPLITS:
        expected = [path.name for path in sorted(folder.iterdir()) if split_of(path.name, **SHARES) == split]
        documents = corpus.split(split)
        assert [document.name for document in documents] == expected
        assert len(documents) == corpus.count(split, "documents") == len(expected) > 0
        assert all(bytes(document.tokens) == (folder / document.name).read_bytes() for document in documents)
        row = b"".join((folder / name).read_bytes() + b"\0" for name in expected)
        assert bytes(documents.tokens) == row
        assert corpus.count(split, "tokens") == corpus.count(split, "bytes") == len(row)
        assert documents[-1].name == expected[-1]
        assert [d.name for d in documents[1:3]] == expected[1:3]
        with pytest.raises(IndexError):
            documents[len(expected)]


@given(texts=st.lists(st.text("aπ\n", max_size=30), max_size=12), at_once=st.integers(1, 40))
def test_texts_come_back_whatever_their_sizes(
    texts: list[str], at_once: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", at_once)
        corpus = request(folder, split_of=lambda name: "train").corpus(folder / "cache")
    expected = {f"a.jsonl/{i}": text.encode() for i, text in enumerate(texts, 1) if text}
    assert content(corpus) == {"train": expected, "val": {}, "test": {}}


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / os.fsdecode(b"na\xefve")).write_text("text")
    (found,) = (names for names in content(request(folder).corpus(tmp_path / "cache")).values() if names)
    assert found == {os.fsdecode(b"na\xefve"): b"text"}


def test_a_corpus_is_tokenised_once(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a")
    made, found = Counted(), Counted()
    before = content(request(folder, tokenizer=made).corpus(tmp_path / "cache"))
    assert made.count == 40
    assert content(request(folder, tokenizer=found).corpus(tmp_path / "cache")) == before
    assert found.count == 0


def change_a_file(folder: Path) -> None:
    (folder / "3.txt").write_text("quite another text")


def rewrite_a_file_with_as_many_bytes(folder: Path) -> None:
    path = folder / "3.txt"
    path.write_text(path.read_text().replace("to", "ot"))
    os.utime(path, ns=(0, 1))  # as a later second would


CHANGES: dict[str, Callable[[Path], Any]] = {
    "another text": change_a_file,
    "as many bytes": rewrite_a_file_with_as_many_bytes,
    "one more": lambda folder: (folder / "new.txt").write_text("new"),
    "one less": lambda folder: (folder / "3.txt").unlink(),
    "another name": lambda folder: (folder / "3.txt").rename(folder / "new.txt"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_source_is_noticed(
    change: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    before = request(folder).corpus(cache)
    change(folder)
    after = request(folder).corpus(cache)
    assert capsys.readouterr().out == f"data.paths: ['{folder}'] has changed since it was tokenised: once more\n"
    assert after.manifest["text_sha256"] != before.manifest["text_sha256"]
    assert content(after) == content(request(folder).corpus(tmp_path / "other"))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_whatever_decides_on_a_corpus_gives_it_a_place_of_its_own(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a")
    source = request(folder).source
    changes: list[dict[str, Any]] = [
        {},
        {"shares": SHARES | {"val_fraction": 0.3}},
        {"source": replace(source, fields=Fields("body", None))},
        {"source": replace(source, paths=[str(folder), str(write_corpus(tmp_path / "b"))])},
    ]
    assert len({request(folder, **change).corpus(tmp_path / "cache").folder for change in changes}) == len(changes)
    same = replace(source, paths=[str(folder / ".." / "a")])
    assert (
        request(folder, source=same).corpus(tmp_path / "cache").folder
        == request(folder).corpus(tmp_path / "cache").folder
    )


def test_the_manifest_says_what_a_corpus_was_made_of(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a")
    corpus = request(folder).corpus(tmp_path / "cache")
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    assert manifest["source"]["paths"] == [str(folder)]
    assert manifest["tokenizer"] == {"kind": "bytes"}
    assert manifest["shares"] == SHARES
    assert sum(split["documents"] for split in manifest["splits"].values()) == 40
    assert len(manifest["text_sha256"]) == 64


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_at", [0, 5, 39])
def test_an_interrupted_tokenisation_leaves_nothing_that_looks_finished(fail_at: int, tmp_path: Path) -> None:
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    with pytest.raises(InterruptionError):
        request(folder, tokenizer=Counted(fail_at)).corpus(cache)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    assert content(request(folder).corpus(cache)) == content(request(folder).corpus(tmp_path / "other"))


def test_an_interrupted_renewal_leaves_what_was_there_to_be_noticed_again(tmp_path: Path) -> None:
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    request(folder).corpus(cache)
    change_a_file(folder)
    with pytest.raises(InterruptionError):
        request(folder, tokenizer=Counted(5)).corpus(cache)
    again = Counted()
    request(folder, tokenizer=again).corpus(cache)
    assert again.count == 40


KILLED = """
import os, signal, sys
from pathlib import Path
from test_corpus import Counted, request
class Killed(Counted):
    def encode(self, texts):
        if self.count > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts)
import train.corpus
train.corpus.AT_ONCE = 1000
request(Path(sys.argv[1]), tokenizer=Killed()).corpus(Path(sys.argv[2]))
"""


def in_subprocess(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": f"{CONFIGS.parent}:{CONFIGS.parent / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_what_a_killed_tokenisation_left_is_swept_away(tmp_path: Path) -> None:
    folder, cache = write_corpus(tmp_path / "a"), tmp_path / "cache"
    assert in_subprocess(KILLED, folder, cache).returncode == -9
    assert any(path.suffix == ".draft" for path in cache.iterdir())
    assert content(request(folder).corpus(cache)) == content(request(folder).corpus(tmp_path / "other"))
    assert sorted(path.suffix for path in cache.iterdir()) in (["", ".lock"], [""])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["manifest.json", "train.tokens", "val.documents", "test.names"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "removed"])
def test_a_corpus_that_is_not_whole_is_made_anew(damage: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    corpus = request(write_corpus(tmp_path / "a")).corpus(tmp_path / "cache")
    before = content(corpus)
    damage(corpus.folder / name)
    assert content(request(tmp_path / "a").corpus(tmp_path / "cache")) == before


def test_a_source_that_is_wrong_in_its_midst_leaves_nothing(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "a")
    (folder / "z.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"z.jsonl, line 1, is no JSON"):
        request(folder).corpus(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import json, sys
from pathlib import Path
from test_corpus import request
import numpy as np
import pyarrow.parquet  # what is loaded on the way is not what grows
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) // 1024
before = peak()
corpus = request(Path(sys.argv[1]), split_of=lambda name: "train").corpus(Path(sys.argv[2]))
made = peak()
print(json.dumps([before, made, corpus.count("train", "bytes") >> 20]))
"""


def megabytes_of_text(count: int) -> Iterator[str]:
    line = "to be or not to be, that is the question\\n" * 250
    return (json.dumps({"text": f"{i} {line}"}) + "\n" for i in range(count * 2**20 // len(line)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_while_a_corpus_is_made(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "a.jsonl").open("w") as file:
        file.writelines(megabytes_of_text(200))
    done = in_subprocess(PEAK, tmp_path / "a", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    before, made, size = json.loads(done.stdout)
    assert size > 180
    assert made - before < 30  # a few batches of AT_ONCE, not the text
