"""Does lm-eval measure of an exported model what we do? `pip install ".[eval]"`, then `pytest -m soak`."""

import math
import random
from pathlib import Path

import pytest
import torch

from train.export import export
from train.extrapolate import token_losses
from xpos_zoo import Transformer

lm_eval = pytest.importorskip("lm_eval")
tasks = pytest.importorskip("lm_eval.tasks")

import xpos_zoo.hf  # noqa: E402, F401 (AutoModelForCausalLM then knows the model)

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("default")]


def test_lm_eval_measures_our_bits_a_byte(trained, tmp_path, monkeypatch):
    n, windows, model = 16, 50, str(tmp_path / "model")
    export(str(trained), model)
    words = random.Random(1).choices(["to", "be", "or", "not", "été", "世界"], k=n * windows)
    text = " ".join(words).encode()[: n * windows].decode(errors="replace").replace("\ufffd", "?")
    data = torch.tensor([0, *text.encode()])  # what stands before a document in training is NUL
    assert len(data) == n * windows + 1
    (tmp_path / "held_out.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    results = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": model, "max_length": n, "prefix_token_id": 0, "dtype": "float32"},
        ["held_out"],
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        task_manager=tasks.TaskManager(
            include_path=str(Path(__file__).parents[1] / "examples"), include_defaults=False
        ),
    )
    theirs = results["results"]["held_out"]["bits_per_byte,none"]
    # It reads n bytes at a time, from the last of those before on, and predicts each byte once: our windows that
    # overlap in one byte, as the text is a whole number of them.
    ours = token_losses(Transformer.from_pretrained(model), data.unfold(0, n + 1, n)).mean().item() / math.log(2)
    print(f"bits a byte: {theirs:.9f} of lm-eval, {ours:.9f} ours")
    assert theirs == pytest.approx(ours, rel=1e-6)
