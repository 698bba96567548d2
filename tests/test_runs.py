"""Runs are found, and only what can be compared is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import changed_run

from train.errors import UserError
from train.runs import check_comparable, find_runs


def test_runs_are_found_once_whichever_folders_are_given(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runs / "xpos")
    folders = [runs / "xpos", tmp_path / "link", runs / "rotary" / ".." / "xpos" / "seed1", runs]
    found = {(run.encoding, run.seed) for run in find_runs(folders)}
    assert len(find_runs(folders)) == 3
    assert found == {("xPos", 1), ("xPos", 2), ("RoPE", 1)}
    check_comparable(find_runs(folders))


def test_layers_that_differ_are_named_together(runs: Path, tmp_path: Path) -> None:
    def mixed(content: dict[str, Any]) -> None:
        positions = content["hyper_parameters"]["positions"]
        content["hyper_parameters"]["positions"] = [positions, {"class_path": "a.ALiBi"}, positions]

    (run,) = find_runs([changed_run(runs / "xpos" / "seed1", tmp_path / "mixed", mixed)])
    assert run.encoding == "xPos and ALiBi"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["datamodule_hyper_parameters"].update(val_fraction=0.2), "(data.val_fraction: "),
        (
            lambda c: c["datamodule_hyper_parameters"].update(context_length=32),
            "(data.context_length: 16 there, 32 here)",
        ),
        (lambda c: c.update(global_step=1), "(steps: 8 there, 1 here)"),
        (lambda c: c["hyper_parameters"].update(embed_dim=32), "(model.embed_dim: 16 there, 32 here)"),
        (lambda c: c["hyper_parameters"].update(scale_base=3), "(scale_base: "),
        (lambda c: c["TextData"].update(tokenizer="{}"), "(tokenizer: "),
        (lambda c: None, "are both seed 1 of xPos"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, runs: Path, tmp_path: Path
) -> None:
    copy = changed_run(runs / "xpos" / "seed1", tmp_path / "copy", change)
    with pytest.raises(UserError, match=r"^runs: ") as refused:
        check_comparable(find_runs([runs / "xpos", copy]))
    assert message in str(refused.value)


def test_encodings_may_differ_in_their_decay(runs: Path, tmp_path: Path) -> None:
    copy = changed_run(runs / "xpos" / "seed1", tmp_path / "copy", lambda c: c["hyper_parameters"].update(scale_base=3))
    check_comparable(find_runs([copy, runs / "rotary"]))


def test_what_is_no_run_of_text_is_refused(runs: Path, tmp_path: Path) -> None:
    odd = changed_run(
        runs / "xpos" / "seed1",
        tmp_path / "odd",
        lambda c: c["datamodule_hyper_parameters"].update(context_length=18),
    )
    for folder, option, message in (
        (tmp_path / "nowhere", "paths", "no trained run in '.*nowhere'"),
        (runs, "couples", "no data.couples: it was trained for something else"),
        (odd, "paths", "the context length must be a multiple of 4, got 18"),
    ):
        with pytest.raises(UserError, match=message):
            find_runs([folder], option)
    checkpoint = odd / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="is no checkpoint, or a damaged one"):
        find_runs([odd])


def test_a_run_gives_its_text_and_its_model(runs: Path, tmp_path: Path) -> None:
    (run,) = find_runs([runs / "rotary"])
    assert len(run.text().documents("test")) > 1
    model = run.model(torch.device("cpu"))
    assert not model.training
    weights = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[f"transformer.{name}"], value) for name, value in model.state_dict().items())
    other = changed_run(runs / "rotary" / "seed1", tmp_path / "other", lambda c: c["TextData"].update(tokenizer="{}"))
    with pytest.raises(UserError, match=r"another tokenizer than data\.tokenizer gives now"):
        find_runs([other])[0].text()
