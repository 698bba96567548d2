"""Checkpoints: written whole, read safely, and with an explanation where they do not fit."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from train.errors import UserError
from train.files import replacing

CONTENT = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "global_step"}
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
UNSHAPED = ("positions", "scale_base", "num_heads")


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one before it, then in its place: whenever that is stopped, one of them is whole.

    Lightning's own brings its draft from the temporary folder, often another disk: a copy that can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as draft, draft.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch wraps the file's own error
            cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)
            if cause is None:
                raise
            before = "; the one before it is whole" if path.exists() else ""
            raise UserError(
                f"the checkpoint {path} cannot be written: {cause.strerror or cause}{before}; "
                "mend that, and the same command goes on"
            ) from error


class Checkpoints(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, but a step's checkpoint is written when the next one starts.

    All that belongs to the step is then on the disk: its row of the log, and its validation if it had one. Lightning's
    own is written before these, so that a process killed in between has a log with a hole.
    """

    begun = 0  # the step that training went on from, whose checkpoint there is

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.begun = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.begun:
            super().on_train_batch_end(trainer, pl_module, None, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pass

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
        # Lightning goes on rightly from what it would have written at the end of the step, so that is what it gets.
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        if progress["total"]["ready"] == progress["total"]["completed"] + 1 == progress["total"]["started"] + 1:
            for count in (progress["current"], progress["total"]):
                count["ready"] -= 1
                count["completed"] -= 1
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


class OwnRates(L.Callback):
    """Goes on from another run's checkpoint at that step, but with this model's learning rates and weight decay."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []  # they may be of another kind

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        made: Any = pl_module.configure_optimizers()
        schedule = made["lr_scheduler"]["scheduler"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses its optimizer's steps
            for _ in range(trainer.global_step):
                schedule.step()
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        config.scheduler.load_state_dict(schedule.state_dict())
        for theirs, ours in zip(optimizer.param_groups, made["optimizer"].param_groups, strict=True):
            theirs.update({name: value for name, value in ours.items() if name != "params"})


def last_checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's content, tensors and plain values alone.

    Raises:
        UserError: the file is missing, truncated, or no checkpoint of this trainer.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; `python -m train fit` writes one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no exception type of its own for a damaged file
        raise UserError(
            f"{path} is no checkpoint, or a damaged one: give one that `python -m train fit` wrote, or remove it"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= CONTENT:
        raise UserError(f"{path} is no checkpoint of this trainer: one holds {', '.join(sorted(CONTENT))}")
    for group in ("hyper_parameters", "datamodule_hyper_parameters"):
        # Lightning imports and calls what is named here.
        if (made_by := content[group].get("_instantiator", INSTANTIATOR)) != INSTANTIATOR:
            raise UserError(f"{path} is no checkpoint of this trainer: it wants {made_by!r} called")
    return content


def check_fits(checkpoint: dict[str, Any], model: L.LightningModule, path: Path) -> None:
    """Raise a `UserError` that says how the checkpoint's model differs from `model` in what it computes, if it does."""
    # No shape tells these; shapes tell all the others, but for block_size, which any model may be evaluated with.
    there, here = ({k: h.get(k) for k in UNSHAPED} for h in (checkpoint["hyper_parameters"], model.hparams))
    if changed := difference(there, here, "model"):
        raise UserError(f"{path} belongs to another model: {changed}")
    state_dict = checkpoint["state_dict"]
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    differences = [
        f"{name} is {theirs.get(name, 'missing')} in the checkpoint, {ours.get(name, 'absent')} in the model"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise UserError(f"{path} belongs to another model: {differences[0]}{more}")


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first setting below `name` in which two configurations differ, in words; nothing if there is none."""
    if there == here:
        return ""
    if isinstance(there, dict) and isinstance(here, dict):
        inner = next(key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
        return difference(there.get(inner), here.get(inner), f"{name}.{inner}" if name else inner)
    return f"{name}: {there} there, {here} here"
