"""The models that come with the code are those of their card."""

import re
from pathlib import Path

import pytest

from train.checkpoint import load_trained
from train.data import TextData
from train.extrapolate import measure_loss
from train.modes import standard_modes
from train.runs import find_runs

MODELS = Path(__file__).parents[1] / "models"


@pytest.mark.slow
def test_the_models_have_the_losses_of_their_card(tmp_path):
    text = TextData(128, cache=str(tmp_path / "cache"))
    if text.state_dict()["text_sha256"] != load_trained(MODELS / "long" / "training.json")["TextData"]["text_sha256"]:
        pytest.skip("another standard library than that of the card")
    results = measure_loss(find_runs([MODELS]), standard_modes(128)[:1], tmp_path / "results.json", longest=8)
    found = results.tables["loss"].groupby(["encoding", "context"])["loss"].mean().unstack()
    card = (MODELS / "README.md").read_text()
    for encoding, losses in found.iterrows():
        (row,) = re.findall(rf"^\| {encoding} \|(.*)\|$", card, re.MULTILINE)
        assert losses.tolist() == pytest.approx([float(entry) for entry in row.split("|")], abs=6e-4)


def test_no_model_is_larger_than_a_repository_bears():
    assert all(path.stat().st_size < 4e6 for path in MODELS.rglob("*"))
