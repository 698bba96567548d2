"""The language model that Lightning trains: its loss, its optimizer, its initial weights."""

import math
from functools import partialmethod
from typing import Any

import lightning as L
import pytest
import torch
from tiny import random_windows, same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.language_model import LanguageModel
from xpos_zoo import XPOS, RotaryEmbedding

SMALL: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 2}


def model(context_length: int = 16, **changes) -> LanguageModel:
    return LanguageModel(context_length, **(SMALL | changes))


def loss_of(module: LanguageModel, batch: Tensor) -> Tensor:
    return cross_entropy(*module.predictions(batch))


def optimizer_of(module: LanguageModel, max_steps: int):
    module.trainer = L.Trainer(max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=False)
    configured = module.configure_optimizers()
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


def test_the_loss_is_the_cross_entropy_of_each_next_token():
    module, tokens = model().double(), random_windows(3, 17)
    logits = module(tokens[:, :-1]).tolist()
    surprises = []
    for row, sequence in zip(logits, tokens.tolist(), strict=True):
        for scores, following in zip(row, sequence[1:], strict=True):
            surprises.append(math.log(math.fsum(math.exp(s) for s in scores)) - scores[following])
    assert len(surprises) == 3 * 16
    rounding = len(surprises) * torch.finfo(torch.float64).eps  # a mean of this many terms, each right to a few eps
    assert loss_of(module, tokens).item() == pytest.approx(math.fsum(surprises) / len(surprises), rel=rounding)


def test_weight_decay_is_on_matrices_alone_and_no_parameter_is_forgotten():
    module = model(weight_decay=0.3)
    optimizer, _ = optimizer_of(module, 10)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim == 2 else 0), name
        assert ("norm" in name) == (parameter.ndim == 1), name


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_scaled_gradients_are_unscaled_before_they_are_clipped(precision, fused, monkeypatch):
    monkeypatch.setattr(L.Trainer, "precision", precision)  # without CUDA, Lightning replaces 16-mixed
    optimizer, _ = optimizer_of(model(), 10)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused  # by which Lightning leaves it to the step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [(5, 40), (10, 10), (20, 10), (9, 10)])
def test_the_learning_rate_rises_linearly_then_follows_its_schedule(schedule, warmup, steps):
    peak = 2e-3
    optimizer, scheduler = optimizer_of(model(learning_rate=peak, warmup_steps=warmup, schedule=schedule), steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    falling = min(round(steps / 5), steps - warmup) if schedule == "wsd" else steps - warmup

    def expected(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        left = min(1.0, (steps - step) / falling) if falling > 0 else 1.0
        match schedule:
            case "constant":
                return peak
            case "cosine":
                return peak * (0.1 + 0.9 * (1 - math.cos(math.pi * left)) / 2)
            case _:
                return peak * (0.1 + 0.9 * left)

    assert rates == pytest.approx([expected(step) for step in range(steps + 1)], rel=1e-13)


def test_both_encodings_start_from_the_same_weights():
    states = []
    for positions in (XPOS, RotaryEmbedding):
        L.seed_everything(1)
        states.append(dict(model(positions=positions).named_parameters()))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpointed_activations_give_the_same_gradients_from_less_memory():
    tokens, gradients, kept = random_windows(2, 33), [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = model(32, num_layers=3, dropout=0.1, checkpoint_activations=checkpointed)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(module, tokens)
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
        kept.append(sum(sizes))
    assert same(*gradients)
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at every input's
@pytest.mark.usefixtures("compiler_counts")
@torch._dynamo.config.patch(recompile_limit=8)
def test_compiled_layers_of_many_kinds_give_the_same_losses_and_the_same_checkpoint_keys(monkeypatch):
    """In training and validation, of another number of windows."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))  # the same graphs
    kinds: dict[str, Any] = {"positions": [XPOS, RotaryEmbedding], "block_size": [4, None]}
    torch.manual_seed(0)
    eager, compiled = (model(compile=compile, **kinds) for compile in (False, True))
    compiled.load_state_dict(eager.state_dict())
    for module, is_compiled in ((eager, False), (compiled, True)):
        module.configure_model()
        assert all((layer._compiled_call_impl is not None) == is_compiled for layer in module.transformer.layers)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for count, training in ((3, True), (3, False), (2, False)):
        losses = []
        for module in (eager, compiled):
            with torch.set_grad_enabled(training):
                losses.append(loss_of(module.train(training), random_windows(count, 17)).item())
        assert losses[1] == pytest.approx(losses[0], rel=64 * torch.finfo(torch.float32).eps)
