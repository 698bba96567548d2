"""Tokens: bytes, a tokenizer that is learned from the text for training, or any tokenizer.json."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import STEPS, complaint_of, fit, options, read_checkpoint, write_corpus

from train import tokens as module
from train.__main__ import main
from train.errors import UserError
from train.extrapolate import extrapolate
from train.measure import read_cells, results_of
from train.runs import find_runs
from train.sample import main as sample
from train.text import TextData
from train.tokens import Bytes, Learned, Subwords, decoded, restored, tokenizer_of

TEXT = ["to be or not to be, that is the question\n" * 9, "naïve π 🙂 <|endoftext|>\n\t\t  x"]


@pytest.fixture(scope="module")
def learned() -> Subwords:
    return Learned(300).learn(TEXT)


def data(tmp_path: Path, **changes: Any) -> TextData:
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    given = {"context_length": 16, "paths": [str(corpus)], "batch_size": 2, "cache": str(tmp_path / "cache")}
    return TextData(**given | {"tokenizer": "bpe", "tokenizer_size": 270} | changes)


@given(st.text())
def test_what_is_encoded_is_decoded_as_it_was(learned: Subwords, text: str) -> None:
    for tokenizer in (Bytes(), learned):
        (numbers,) = tokenizer.encode([text])
        assert decoded(tokenizer, numbers.tolist()) == text
        assert tokenizer.separator not in numbers or "\0" in text
        assert all(numbers < tokenizer.size)


def test_text_that_reads_like_a_separator_is_none(learned: Subwords) -> None:
    (numbers,) = learned.encode(["a<|endoftext|>b"])
    assert learned.separator not in numbers
    assert decoded(learned, [learned.separator]) == "<|endoftext|>"


def test_learning_gives_the_same_tokenizer_each_time_and_fewer_tokens_than_bytes(learned: Subwords) -> None:
    assert Learned(300).learn(TEXT).to_json() == learned.to_json()
    assert restored(learned.to_json()).state == learned.state
    assert learned.size <= 300
    assert len(learned.encode(TEXT[:1])[0]) < len(TEXT[0]) / 3


def word_level(*special: str) -> str:
    """A tokenizer.json of another kind, which cuts at four tokens and pads."""
    words = {"[UNK]": 0, "to": 1, "be": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer.to_str()


@pytest.mark.parametrize(("special", "separator"), [((), 3), (("[CLS]", "</s>"), 4), (("</s>", "<|endoftext|>"), 4)])
def test_any_tokenizer_has_a_separator_its_own_if_it_has_one(special: tuple[str, ...], separator: int) -> None:
    tokenizer = Subwords.from_json(word_level(*special), "here")
    assert (tokenizer.separator, tokenizer.size) == (separator, max(len(special), 1) + 3)
    (numbers,) = tokenizer.encode(["to be or to be or to"])
    assert numbers.tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert restored(tokenizer.to_json()).separator == separator


# --- a corpus of them ------------------------------------------------------------------------------------------------


def test_a_learned_tokenizer_is_kept_beside_the_corpus_and_learned_from_training_text_alone(tmp_path: Path) -> None:
    text = data(tmp_path)
    alone = [(tmp_path / "corpus" / document.name).read_text() for document in text.documents("train")]
    corpus = text.corpus
    assert (corpus.folder / "tokenizer.json").read_text() == corpus.tokenizer.to_json()
    vocabulary = json.loads(Learned(270).learn(alone).to_json())["model"]["vocab"]
    assert json.loads(corpus.tokenizer.to_json() or "")["model"]["vocab"] == vocabulary
    for document in text.documents("test"):
        assert decoded(corpus.tokenizer, document.tokens.tolist()) == (tmp_path / "corpus" / document.name).read_text()
    row = text.documents("test").tokens
    assert row.dtype == np.uint16
    assert (row == corpus.tokenizer.separator).sum() == len(text.documents("test"))
    sizes = sum((tmp_path / "corpus" / d.name).stat().st_size + 1 for d in text.documents("test"))
    assert text.tokens_per_byte("test") == len(row) / sizes


def test_learning_stops_where_memory_would_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNED_FROM", 700)
    monkeypatch.setattr("train.corpus.LEARNED_FROM", 700)
    text = data(tmp_path)
    first = next(iter(text.documents("train"))).name
    read = (tmp_path / "corpus" / first).read_text()
    assert len(read) > 700
    assert text.corpus.tokenizer.to_json() == Learned(270).learn([read]).to_json()


def test_another_tokenizer_has_a_corpus_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(word_level())
    changes: list[dict[str, Any]] = [
        {"tokenizer": "bytes", "tokenizer_size": None},
        {"tokenizer_size": 280},
        {"tokenizer": str(path), "tokenizer_size": None},
    ]
    folders = [data(tmp_path, **change).corpus.folder for change in changes]
    path.write_text(word_level("</s>"))
    folders.append(data(tmp_path, **changes[-1]).corpus.folder)
    assert len(set(folders)) == len(folders)


# --- a model of them -------------------------------------------------------------------------------------------------

BPE: dict[str, Any] = {"data__tokenizer": "bpe", "data__tokenizer_size": 270}


def test_a_model_of_learned_tokens_is_trained_measured_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, **BPE)
    assert "vocab_size" not in yaml.safe_load((run / "config.yaml").read_text())["model"]
    checkpoint = read_checkpoint(run)
    assert checkpoint["state_dict"]["transformer.embedding.weight"].shape == (270, 16)
    (log,) = run.glob("metrics/*/metrics.csv")
    rows = [row for row in csv.DictReader(log.read_text().splitlines()) if row["val_bits_per_byte"]]
    bits_per_byte, nats_per_token = (float(rows[-1][f"val_{name}"]) for name in ("bits_per_byte", "nats_per_token"))
    (found,) = find_runs([str(run)])
    ratio = found.text().tokens_per_byte("val")
    assert ratio < 0.6
    assert bits_per_byte == pytest.approx(nats_per_token / math.log(2) * ratio, rel=1e-5)

    extrapolate([str(run)], output=str(tmp_path / "out"), longest=1, windows=2, modes=["dense"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Loss, nats a token" in report
    assert "the same last 8 tokens of each window" in report
    losses = results_of(*read_cells(tmp_path / "out" / "results.json")).tables["loss"]
    bits = losses.query("context == 16")["loss"].mean() / math.log(2) * found.text().tokens_per_byte("test")
    assert f"{bits:.3f}" in report.split("## Bits a byte")[1]

    (tmp_path / "cache").rename(tmp_path / "elsewhere")  # a sample needs the checkpoint alone
    capsys.readouterr()
    sample(["--checkpoint", str(run), "--prompt", "to be", "--max_new_tokens", "9", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("to be")


def test_a_run_goes_on_only_with_its_own_tokenizer_and_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(word_level())
    words: dict[str, Any] = {"data__tokenizer": path, "data__context_length": 8}
    run = fit(tmp_path, **words, trainer__max_steps=2)
    last = run / "checkpoints" / "last.ckpt"
    path.write_text(word_level().replace('"to"', '"not"'))
    for command, changes in (("validate", {}), ("fit", {"name": "other", "ckpt_path": last})):
        line = complaint_of(main, [command, *options(tmp_path, **words, **changes)], capfd)
        assert line == f"{last} belongs to another tokenizer: data.tokenizer must give the one it was trained with"
    with pytest.raises(UserError, match=f"{last} has another tokenizer than data.tokenizer gives now"):
        find_runs([str(run)])[0].text()


def test_a_run_whose_text_has_changed_does_not_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"global_step": STEPS - 1}, run / "checkpoints" / "last.ckpt")
    (tmp_path / "corpus" / "3.txt").write_text("another text")
    line = complaint_of(main, ["fit", *options(tmp_path)], capfd)
    assert line.startswith(f"{run} holds a run of another text: ['{tmp_path / 'corpus'}'] has changed since; give this")
    main(["test", *options(tmp_path)])  # a model may be tested on any text


# --- bad input -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such word": ({"tokenizer": "words"}, "data.tokenizer must be bytes, bpe, or the path of a tokenizer.json, got"),
    "no such file": ({"tokenizer": "no.json"}, "data.tokenizer: 'no.json' cannot be read: No such file or directory"),
    "no size": (
        {"tokenizer": "bpe"},
        "data.tokenizer bpe needs data.tokenizer_size, how many tokens to learn, such as",
    ),
    "no room": (
        {"tokenizer": "bpe", "tokenizer_size": 257},
        "data.tokenizer_size must be above 257 with data.tokenizer bpe",
    ),
    "fewer than bytes": (
        {"tokenizer": "bytes", "tokenizer_size": 99},
        "data.tokenizer_size is 99, too small for the 256",
    ),
    "fewer than tokens": (
        {"tokenizer": "{words}", "tokenizer_size": 3},
        "data.tokenizer_size is 3, too small for the 4 ",
    ),
    "no JSON": ({"tokenizer": "{empty}"}, "data.tokenizer: .*empty.json is no tokenizer.json: EOF while parsing"),
    "other JSON": ({"tokenizer": "{other}"}, "data.tokenizer: .*other.json is no tokenizer.json: "),
    "no UTF-8": ({"tokenizer": "{latin}"}, "data.tokenizer: '.*latin.json' cannot be read: .*can't decode byte 0xef"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_tokenizer_is_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {"words": word_level().encode(), "empty": b"", "other": b'{"a": 1}', "latin": b"na\xefve"}
    for name, written in content.items():
        (tmp_path / f"{name}.json").write_bytes(written)
    paths = {name: tmp_path / f"{name}.json" for name in content}
    with pytest.raises(UserError, match=message):
        tokenizer_of(given["tokenizer"].format(**paths), given.get("tokenizer_size"))


def test_a_vocabulary_can_be_larger_than_its_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_of("bytes", 320)[1] == 320
    assert data(tmp_path, tokenizer="bytes", tokenizer_size=None).vocab_size == 256


def test_without_the_package_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"data.tokenizer needs the package tokenizers, .*: pip install tokenizers$"):
        tokenizer_of("bpe", 300)
    assert tokenizer_of("bytes", None)[1] == 256
