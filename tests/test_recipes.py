"""The study's recipes: each trains, and a run of it is called by its name again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import CONFIGS, LAST, fit

from study.__main__ import Study
from study.recipes import PARTIAL, recipes
from train.runs import read_run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as a user has it: an error would have jsonargparse try the next type
def test_every_recipe_trains_and_a_run_of_it_is_called_by_its_name(tmp_path: Path):
    parts = [part for part in Study().measurements() if part.name in ("recipes_loss", "recall_cosine")]
    for name, training in {each.encoding: each for part in parts for each in part.trainings}.items():
        (arguments,) = training.work.args  # type: ignore[attr-defined]
        model = tuple(argument for argument in arguments if argument.startswith("--model."))
        sizes: dict[str, Any] = {"model__num_layers": 4, "model__num_heads": 4, "trainer__max_steps": 2}
        run = read_run(fit(tmp_path, "cpu", model, name=training.folder.parent.name, **sizes) / LAST)
        assert run.encoding == name or name not in recipes(128, 4)
        assert len(run.model(torch.device("cpu")).layers) == 4


def test_the_recommended_configuration_is_the_recipe_of_that_name():
    model = yaml.safe_load((CONFIGS / "long.yaml").read_text())["model"]
    assert model == recipes(128, 4)[PARTIAL]
