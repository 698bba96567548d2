"""What a training can show on its way, by a line of YAML each: samples of text, and how fast it goes."""

import math
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from train.errors import UserError
from train.tokens import Bytes, Tokenizer, decoded
from xpos_zoo import Transformer


class SampleText(L.Callback):
    """At each validation, prints what the model makes of a prompt, and logs it to TensorBoard.

    Training goes on with the numbers that it would have had without. Sharded models are not sampled.

    Args:
        prompt: how the text begins; at least one character.
        max_new_tokens: how many tokens to draw.
        temperature, top_k, top_p: how; see `python -m train.sample`.
        seed: of the draws, the same at each validation.

    Raises:
        UserError: the prompt is empty.
    """

    def __init__(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        if not prompt:
            raise UserError("SampleText.prompt must have at least one character, got none")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A sharded model is whole in a forward pass of all processes alone.
        if trainer.sanity_checking or not trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy):
            return
        model: Any = pl_module.transformer
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer: Tokenizer = data.corpus.tokenizer if hasattr(data, "corpus") else Bytes()
        tokens = torch.tensor([tokenizer.encode([self.prompt])[0].tolist()], dtype=torch.int64, device=pl_module.device)
        try:
            drawn = model.generate(tokens, self.max_new_tokens, **self.options)
        except ValueError as error:
            raise UserError(f"SampleText: {error}") from error
        text = decoded(tokenizer, drawn[0].tolist())
        trainer.print(f"--- sample after step {trainer.global_step}\n{text}\n---")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", trainer.global_step)


class Throughput(L.Callback):
    """Logs tokens a second over all devices and, on GPUs whose peak is known, the share of it that is used (MFU).

    Both are means since the last row of the log, without validation, and stand in the progress bar, too.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        self.flops = training_flops(module.transformer, module.hparams["context_length"])
        half = {"bf": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision)[:2], torch.float32)
        device = trainer.strategy.root_device
        self.peak = get_available_flops(device, half) if device.type == "cuda" else None
        self._start(trainer.global_step)

    def _start(self, step: int) -> None:
        self.step, self.tokens, self.paused, self.since = step, 0, 0.0, time.monotonic()
        self.pause: float | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pause is not None:  # other callbacks may have gone on after the validation
            self.paused += time.monotonic() - self.pause
            self.pause = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        inputs = batch[:, :-1] if isinstance(batch, torch.Tensor) else batch[0]
        self.tokens += inputs.numel() * trainer.world_size
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step > self.step and trainer.global_step % every == 0:
            speed = self.tokens / max(time.monotonic() - self.since - self.paused, 1e-9)
            pl_module.log("tokens_per_second", speed, prog_bar=True)
            if self.peak:
                pl_module.log("mfu", speed * self.flops / (self.peak * trainer.world_size), prog_bar=True)
            self._start(trainer.global_step)


def training_flops(model: Transformer, context_length: int) -> float:
    """Multiplications and additions a token of a training step at this length: forward, and twice that backward.

    Those of weights that multiply, and of the scores and values that causality leaves: half of all, or in blocks of B
    those of at most 2B keys. What checkpointed activations compute again does not count.
    """
    weights = model.head.weight.numel() + sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    scores = sum(
        4 * attention.num_heads * attention.head_dim * min(context_length / 2, 1.5 * (attention.block_size or math.inf))
        for attention in model.attentions
    )
    return 3 * (2 * weights + scores)
