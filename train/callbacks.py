"""What can a training show on its way, by a line of YAML each? Samples of text, and how fast it goes."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ThroughputMonitor, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from train.errors import UserError
from train.tokens import byte_tokenizer, decode
from xpos_zoo import Transformer


class ProgressBar(TQDMProgressBar):
    """One line, whether or not rich is installed, without Lightning's v_num, the end of a logger's name."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


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
        tokenizer = getattr(trainer.datamodule, "tokenizer", None) or byte_tokenizer()  # type: ignore[attr-defined]
        prompt = tokenizer.encode(self.prompt, add_special_tokens=False).ids
        if not prompt:
            raise UserError(f"SampleText.prompt must have at least one token, got {self.prompt!r}")
        model: Any = pl_module.transformer
        # A sharded model is whole in a forward pass of all processes alone, as is a sharded window.
        sharded = isinstance(trainer.strategy, ModelParallelStrategy) or model.cp_mesh is not None
        if trainer.sanity_checking or not trainer.is_global_zero or sharded:
            return
        try:
            drawn = model.generate(torch.tensor([prompt], device=pl_module.device), self.max_new_tokens, **self.options)
        except ValueError as error:
            raise UserError(f"SampleText: {error}") from error
        text = "".join(decode(tokenizer, drawn[0].tolist()))
        trainer.print(f"--- sample after step {trainer.global_step}\n{text}\n---")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", trainer.global_step)


class Throughput(ThroughputMonitor):
    """Logs Lightning's measures of speed: windows and tokens a second and, on known GPUs, the share of their peak.

    Args:
        window_size: over how many batches.
    """

    def __init__(self, window_size: int = 100):
        super().__init__(
            batch_size_fn=lambda batch: len(inputs(batch)),
            length_fn=lambda batch: inputs(batch).numel(),
            window_size=window_size,
        )

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        module: Any = trainer.lightning_module
        length = module.options.context_length // module.options.context_parallel_size
        tokens = trainer.datamodule.options.batch_size * length  # type: ignore[attr-defined]
        module.flops_per_batch = tokens * training_flops(module.transformer, module.options.context_length)
        super().on_train_start(trainer, *args)


def inputs(batch: Any) -> torch.Tensor:
    return batch[:, :-1] if isinstance(batch, torch.Tensor) else batch[0]


def training_flops(model: Transformer, context_length: int) -> float:
    """Multiplications and additions a token of a training step: forward, and twice that backward.

    Those of weights that multiply, and of the scores and values that causality leaves: half of all, or in blocks of B
    those of at most 2B keys. What checkpointed activations compute again does not count.
    """
    weights = model.head.weight.numel() + sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    scores = sum(
        4 * attention.num_heads * attention.head_dim * min(context_length / 2, 1.5 * (attention.block_size or math.inf))
        for attention in model.attentions
    )
    return 3 * (2 * weights + scores)
