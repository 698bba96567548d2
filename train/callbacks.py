"""Callbacks of a training: samples of text, speed, the last checkpoint; and which of Lightning's are refused."""

import math
from pathlib import Path
from pydoc import locate
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tokenizers import Tokenizer

from train.errors import UserError
from train.language_model import TRAIN_METRICS, VAL_METRICS
from train.tokens import byte_tokenizer, decode
from xpos_zoo import Transformer
from xpos_zoo.generation import sample as draw

NO_EPOCHS = "training draws random windows, so it has no epochs"
REFUSED: dict[type[L.Callback], str] = {
    BaseFinetuning: NO_EPOCHS,
    BasePredictionWriter: "nothing is predicted",
    BatchSizeFinder: "a run's numbers depend on data.batch_size; set it",
    GradientAccumulationScheduler: f"{NO_EPOCHS}; set trainer.accumulate_grad_batches",
    LearningRateFinder: "a run's numbers depend on model.learning_rate; set it",
    ModelPruning: NO_EPOCHS,
    OnExceptionCheckpoint: "a new run would begin from its file; ModelCheckpoint has save_on_exception",
    SpikeDetection: "Lightning cannot load its state, so the run could not resume",
    StochasticWeightAveraging: f"{NO_EPOCHS}; EMAWeightAveraging averages after each step",
}
NEED_A_LOGGER = (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor)
# Arguments of Lightning's callbacks that count epochs, and the values that they may have without any.
COUNT_EPOCHS: dict[str, tuple[Any, ...]] = {
    "interval": ("step",),
    "check_on_train_epoch_end": (None, False),
    "every_n_epochs": (None, 0, 1),
    "update_starting_at_epoch": (None,),
}


class OneLineProgressBar(TQDMProgressBar):
    """One line, whether or not rich is installed, without Lightning's v_num, the end of a logger's name."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class LastCheckpoint(ModelCheckpoint):
    """Keeps a run's last checkpoint, also where a limit of time or a callback ends the training before its last step.

    Args:
        path: of the checkpoint.
        every: how many steps from one to the next.
    """

    def __init__(self, path: Path, every: int):
        super().__init__(
            path.parent, save_last=True, save_top_k=0, every_n_train_steps=every, enable_version_counter=False
        )
        self.path = path
        self.ended_early = False

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.should_stop:  # saved here, and not after the training, it resumes like any other checkpoint
            trainer.save_checkpoint(self.path)
            self.ended_early = True

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume at the beginning of a step, and with the whole time that a Timer gives."""
        for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):  # type: ignore[attr-defined]
            checkpoint["callbacks"].pop(timer.state_key, None)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            extra = counts["ready"] - checkpoint["global_step"] * trainer.accumulate_grad_batches
            counts.update({name: count - extra for name, count in counts.items()})


def check_chosen(options: Any) -> None:
    """Raise a UserError for the first callback in a trainer's options that is not supported, or does nothing."""
    given = options.callbacks or []
    for each in given if isinstance(given, list) else [given]:
        kind: Any = locate(each.class_path)
        for refused, reason in REFUSED.items():
            if isinstance(kind, type) and issubclass(kind, refused):
                raise UserError(f"trainer.callbacks: {kind.__name__} is not supported: {reason}")
        if kind is Timer and options.max_time is not None:
            raise UserError("trainer.max_time and the callback Timer both limit the time; give one")
        for name, value in each.get("init_args", {}).items() if each.class_path.startswith("lightning.") else ():
            if value not in COUNT_EPOCHS.get(name, (value,)):
                raise UserError(f"trainer.callbacks: {kind.__name__}.{name} must not be {value}: {NO_EPOCHS}")


def check_callbacks(trainer: Any, data: Any) -> None:
    """Raise a UserError for the first callback that lacks what it needs, or would write where the trainer does."""
    own = ("lightning.", "train.", "study.")  # what other callbacks log is not known
    everything_known = all(type(each).__module__.startswith(own) for each in trainer.callbacks)
    metrics = (*TRAIN_METRICS, *(VAL_METRICS if trainer.limit_val_batches else ()))
    for callback in trainer.callbacks:
        name, monitor = type(callback).__name__, str(getattr(callback, "monitor", None) or metrics[0])
        if isinstance(callback, NEED_A_LOGGER) and not trainer.loggers:
            raise UserError(f"trainer.callbacks: {name} needs a logger, but trainer.logger is false; leave out one")
        if everything_known and monitor not in metrics and not monitor.startswith("lr-"):
            raise UserError(f"trainer.callbacks: {name}.monitor must be one of {', '.join(metrics)}, got {monitor}")
        if isinstance(callback, Checkpoint) and not isinstance(callback, LastCheckpoint):
            names = ("last" if getattr(callback, "save_last", False) else None, getattr(callback, "filename", None))
            folder = Path(getattr(callback, "dirpath", None) or "elsewhere").resolve()
            if "last" in names and folder == Path(trainer.default_root_dir, "checkpoints").resolve():
                raise UserError(f"trainer.callbacks: {name} must write its last.ckpt elsewhere than in {folder}")
        if isinstance(callback, SampleText):
            callback.encode_prompt(data)


class SampleText(L.Callback):
    """At each validation, prints what the model makes of a prompt, and logs it to TensorBoard.

    Training goes on with the numbers that it would have had without. Sharded models are not sampled.

    Args:
        prompt: how the text begins; at least one character.
        max_new_tokens: how many tokens to draw.
        temperature, top_k, top_p: how; see `python -m train.sample`.
        seed: of the draws, the same at each validation.

    Raises:
        UserError: the prompt is empty, or a number is out of range.
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
        if max_new_tokens < 0:
            raise UserError(f"SampleText.max_new_tokens must be 0 or above, got {max_new_tokens}")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        try:
            draw(torch.zeros(1, 1), temperature, top_k, top_p)
        except ValueError as error:
            raise UserError(f"SampleText.{error}") from error

    def encode_prompt(self, data: Any) -> tuple[Tokenizer, list[int]]:
        """The tokenizer of the data, and the prompt's tokens; a UserError if there are none."""
        tokenizer = getattr(data, "tokenizer", None) or byte_tokenizer()
        prompt = tokenizer.encode(self.prompt, add_special_tokens=False).ids
        if not prompt:
            raise UserError(f"SampleText.prompt must have at least one token, got {self.prompt!r}")
        return tokenizer, prompt

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tokenizer, prompt = self.encode_prompt(trainer.datamodule)  # type: ignore[attr-defined]
        model: Any = pl_module.transformer
        # A sharded model is whole in a forward pass of all processes alone, as is a sharded window.
        sharded = isinstance(trainer.strategy, ModelParallelStrategy) or model.cp_mesh is not None
        if trainer.sanity_checking or not trainer.is_global_zero or sharded:
            return
        drawn = model.generate(torch.tensor([prompt], device=pl_module.device), self.max_new_tokens, **self.options)
        text = "".join(decode(tokenizer, drawn[0].tolist()))
        trainer.print(f"--- sample after step {trainer.global_step}\n{text}\n---")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", f"```\n{text}\n```", trainer.global_step)


class Throughput(ThroughputMonitor):
    """Logs Lightning's measures of speed: windows and tokens a second and, on known GPUs, the share of their peak.

    Args:
        window_size: over how many batches; at least 2.
    """

    def __init__(self, window_size: int = 100):
        if window_size < 2:
            raise UserError(f"Throughput.window_size must be 2 or above, got {window_size}")
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
    those of at most 2B keys, with a window its own. What checkpointed activations compute again does not count.
    """
    weights = model.head.weight.numel() + sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    scores = sum(
        4
        * attention.num_heads
        * attention.head_dim
        * min(context_length / 2, 1.5 * (attention.block_size or math.inf), attention.window_size or math.inf)
        for attention in model.attentions
    )
    return 3 * (2 * weights + scores)
