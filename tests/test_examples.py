"""What the README and the examples claim: its code runs as printed, their values are what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES, README = ROOT / "examples", (ROOT / "README.md").read_text()
ROUNDOFF = torch.finfo(torch.float32).eps
ROUNDOFF_64 = torch.finfo(torch.float64).eps


def claims(name: str) -> dict[str, float]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


@pytest.mark.slow
def test_nanogpt_reads_64_times_its_trained_length_no_worse():
    loss = claims("nanogpt")
    assert loss["64 rows of 64 bytes"] < 2.5  # it has learned: the frequencies of single bytes alone give 3.2
    # Blockwise, a byte sees 32 to 64 bytes and never 0; dense, it sees too many.
    assert loss["one row of 4096, blockwise"] < loss["64 rows of 64 bytes"] < loss["one row of 4096, dense"]


def test_a_decoder_layer_is_torchs_but_for_positions_and_stays_causal():
    found = claims("decoder_layer")
    assert found["without positions, largest difference from torch's"] < 100 * ROUNDOFF_64  # outputs are about 3
    assert found["with xPos, largest difference from torch's"] > 0.1
    assert found["gradient of the first 10 outputs for later tokens"] == 0
    assert found["gradient of the first 10 outputs for their tokens"] > 1
    assert found["gradient of the first 10 outputs for the memory"] > 1  # cross-attention is still there


@pytest.mark.slow
def test_a_llama_with_our_attention_is_no_less_exact_and_becomes_an_xpos_model_that_reads_on():
    pytest.importorskip("transformers")
    found = claims("llama")
    for dtype in ("float", "bfloat16"):
        assert found[f"error, ours, {dtype}"] <= found[f"error, Llama, {dtype}"]
    assert found["error, ours, float"] < 8 * ROUNDOFF
    assert abs(found["loss, xPos, same weights"] - found["loss, Llama"]) < 0.05
    assert found["loss, xPos, 25 steps later"] < found["loss, Llama"]
    assert found["loss at 4096, xPos, blockwise"] < found["loss, xPos, 25 steps later"]
    assert found["loss at 4096, Llama"] > found["loss, Llama"] + 0.1


def test_a_mistral_with_a_sliding_window_gives_the_same_logits_here():
    pytest.importorskip("transformers")
    found = claims("mistral")
    for what in ("of the logits", "from a cache", "within one window"):
        assert found[f"error {what}"] < 32 * ROUNDOFF  # they compute angles in float32
    assert found["difference without a window"] > 0.1
    assert found["slots of the cache"] < 2 * 16


def test_a_stream_costs_the_same_for_ever_and_gives_the_logits_of_one_forward():
    found = claims("stream")
    for what in ("operations", "bytes"):
        assert found[f"{what}, token 500"] == found[f"{what}, token 1"] > 0
    assert found["error of the stream"] <= 2 * found["error of one forward"] < 100 * ROUNDOFF  # logits are about 1


def test_retention_is_the_same_in_parallel_and_recurrent_form():
    error = claims("retention")
    assert error["float64"] < 100 * ROUNDOFF_64
    assert error["float32, parallel"] < 4 * ROUNDOFF
    assert error["float32, recurrent"] < 256 * ROUNDOFF  # one rounding of the state's ageing, 256 times


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert all(f'claims("{path.stem}")' in tested for path in EXAMPLES.glob("*.py"))


def test_the_readmes_examples_run_one_after_the_other():
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert {"attention", "cache", "model", "q", "k"} <= names.keys()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.stem)
def test_every_file_and_test_that_a_page_names_is_there(page):
    text = page.read_text()
    for path in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"\b(configs/\w+\.yaml)", text):
        assert (ROOT / path).exists(), path
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text)) - {"test_fraction"}  # an option
    assert {name for name in named if f"def {name}(" not in tests} == set()
