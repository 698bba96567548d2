"""`python -m train fit --config configs/xpos.yaml`: train, validate and test from YAML with Lightning."""

import logging
import re
import signal
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from jsonargparse.typing import restricted_number_type
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from train.callbacks import SampleText, Throughput
from train.checkpoint import (
    CheckpointFiles,
    Checkpoints,
    OwnRates,
    check_fits,
    difference,
    last_checkpoint_of,
    load_checkpoint,
)
from train.errors import UserError, explained, told_in_one_line
from train.files import replacing, to_itself
from train.language_model import LanguageModel
from train.text import TextData

CALLBACKS = (Checkpoints, SampleText, Throughput)  # imported, so that YAML can name them without their module
# What a run goes on with may differ from what it was begun with in these, which do not change its numbers, ...
FREE = {"model": {"compile", "checkpoint_activations"}, "data": {"num_workers", "cache"}}
# ... and in all of the trainer's options but these, which do.
BOUND = {"max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision"}

SAVED_EVERY = 100  # steps, where the configuration names no callback that keeps the last checkpoint

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])  # what NumPy takes


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration of a training into its run folder."""

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            with replacing(config_of(Path(trainer.default_root_dir))) as draft:
                self.parser.save(self.config, draft, skip_unset=False, overwrite=True, multifile=False)


def config_of(run: Path) -> Path:
    return run / "config.yaml"


class ProgressBar(TQDMProgressBar):
    """Without Lightning's v_num, the end of a logger's name."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class RunCLI(LightningCLI):
    """Lightning's command line, with a folder a run: <runs>/<name>/seed<seed>.

    `fit` goes on from the folder's last checkpoint, and does nothing if that run is finished; `validate` and `test`
    read it. A folder that holds a run of another model, data, seed or number of steps is left alone.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=Seed, default=1, help="Seed of weights and of the data's order.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; default: the config's.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder for all runs.")
        parser.link_arguments("data.context_length", "model.context_length")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise explained(error, self._subcommand_parsers["fit"]) from error

    def _parse_ckpt_path(self) -> None:
        """Keep to the configuration: Lightning would let the checkpoint's hyperparameters override it in silence."""

    @property
    def options(self) -> Any:
        return self.config[str(self.subcommand)]

    @property
    def run_folder(self) -> Path:
        configs = self.options.config or []
        name = self.options.name or (Path(str(configs[-1])).stem if configs else "unnamed")
        return Path(self.options.runs) / name / f"seed{self.options.seed_everything}"

    def before_instantiate_classes(self) -> None:
        if self.options.trainer.max_steps <= 0:
            raise UserError(
                f"trainer.max_steps must be above 0, got {self.options.trainer.max_steps}: training draws random "
                "windows, so it has no epochs"
            )
        self._check_strategy()
        callbacks: list[Any] = []
        if self.options.trainer.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        if self.options.trainer.enable_checkpointing is not False and not self._keeps_last_checkpoint():
            callbacks.append(Checkpoints(save_last=True, save_top_k=0, every_n_train_steps=SAVED_EVERY))
        self.trainer_defaults["callbacks"] = callbacks

    def _check_strategy(self) -> None:
        strategy = self.options.trainer.strategy
        options = {} if isinstance(strategy, str) else strategy.get("init_args", {})
        for option, right, why in (
            ("tensor_parallel_size", 1, "a model is sharded over data_parallel_size devices, and no layer is split"),
            ("save_distributed_checkpoint", False, "a checkpoint is one file, whatever wrote it"),
        ):
            if (given := options.get(option, right)) != right:
                raise UserError(f"trainer.strategy.{option} must be {right}, got {given}: {why}")

    def _keeps_last_checkpoint(self) -> bool:
        """Whether a callback does, without which a run could not go on."""
        callbacks = self.options.trainer.callbacks or []
        return any(c.get("init_args.save_last") for c in (callbacks if isinstance(callbacks, list) else [callbacks]))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            cause = error.__cause__  # of several types that an option may have, what the first one says
            if isinstance(cause, UserError):
                raise cause from None
            if why := re.match(r"Problem with given class_path '([\w.]+)':\s*(.*)", str(cause), re.DOTALL):
                raise UserError(f"{why[1]} cannot be made: {why[2]}") from error
            if what := re.search(r"Given value: Namespace\(class_path='([\w.]+)'", str(error)):
                raise UserError(f"{what[1]} cannot be made: {cause}") from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder = self.run_folder
        self.options.model.scale_base = self.model.hparams["scale_base"]  # record what the default came to
        if self.options.trainer.logger is None:
            kwargs["logger"] = self.subcommand == "fit" and [
                TensorBoardLogger(folder, name=None, version="tensorboard"),
                CSVLogger(folder, name="metrics"),
            ]
        if self.options.trainer.plugins is None:
            kwargs["plugins"] = [CheckpointFiles()]
        try:
            trainer = super().instantiate_trainer(default_root_dir=str(folder), **kwargs)
        except ValueError as error:
            raise UserError(f"trainer: {error}") from error
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            if callback.dirpath is None:
                callback.dirpath = str(last_checkpoint_of(folder).parent)
            callback._enable_version_counter = False  # or a callback that was changed starts a last-v1.ckpt
            if self.options.trainer.fast_dev_run:
                callback.save_last = False  # Lightning skips all other checkpoints of such a trial
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        folder, steps = self.run_folder, self.trainer.max_steps
        last = last_checkpoint_of(folder)
        if last.exists():
            self._check_same_run()
        if last.exists() or ckpt_path == "last":
            ckpt_path = str(last)
        elif ckpt_path:
            self.trainer.callbacks.append(OwnRates())  # type: ignore[attr-defined]
        begun = self._to_go_on_from(ckpt_path) if ckpt_path else {"global_step": 0}
        done = begun["global_step"]
        if done >= steps or (done and self._stopped_early(begun)):
            state = f"{folder} is finished" if ckpt_path == str(last) else f"nothing to train in {folder}"
            has = f"all {steps} steps" if done >= steps else f"{done} of {steps} steps, and was stopped early"
            self.trainer.print(f"{state}: {ckpt_path} has {has}")
            return
        self.datamodule.setup("fit")  # complains about the text before the trainer writes its first file
        if ckpt_path:
            self._check_text(ckpt_path, same=ckpt_path == str(last))
        # Of several processes of one training, the first stands for all.
        with to_itself(folder / ".lock") if self.trainer.is_global_zero else nullcontext(True) as alone:
            if not alone:
                raise UserError(f"{folder} is being trained by another process; wait for it, or end it")
            self.trainer.print(f"{folder}: steps {done + 1} to {steps} on {self.trainer.strategy.root_device}")
            try:
                self.trainer.fit(weights_only=True, ckpt_path=ckpt_path, **kwargs)
            except SystemExit:
                if not self.trainer.interrupted:
                    raise
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from here on
                raise KeyboardInterrupt from None
            finished = self.trainer.global_step >= steps or self.trainer.should_stop
            if finished and not self.options.trainer.fast_dev_run:
                self.trainer.save_checkpoint(last, weights_only=False)

    def _stopped_early(self, checkpoint: dict[str, Any]) -> bool:
        states = checkpoint.get("callbacks", {}).values()
        return bool(self.trainer.early_stopping_callbacks) and any(s.get("stopping_reason_message") for s in states)

    def validate(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        self.trainer.validate(weights_only=True, ckpt_path=self._trained(ckpt_path), **kwargs)

    def test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        self.trainer.test(weights_only=True, ckpt_path=self._trained(ckpt_path), **kwargs)

    def _trained(self, ckpt_path: str | None) -> str:
        path = self._path_of(ckpt_path)
        self._checkpoint(path)
        self._check_text(path, same=False)
        return path

    def _path_of(self, ckpt_path: str | None) -> str:
        """The checkpoint that is named, by Lightning's word `last` or by default the run's last one."""
        return str(last_checkpoint_of(self.run_folder)) if ckpt_path in (None, "last") else ckpt_path

    def _checkpoint(self, path: str) -> dict[str, Any]:
        checkpoint = load_checkpoint(Path(path))
        check_fits(checkpoint, self.model, Path(path))
        return checkpoint

    def _to_go_on_from(self, path: str) -> dict[str, Any]:
        checkpoint = self._checkpoint(path)
        if "optimizer_states" not in checkpoint:
            raise UserError(f"{path} holds weights alone; training goes on only from one with the optimizer's state")
        return checkpoint

    def _check_text(self, path: str, same: bool) -> None:
        """A checkpoint's tokens must mean what they mean here; a run goes on with the `same` text, too."""
        there = load_checkpoint(Path(path)).get(type(self.datamodule).__qualname__)
        here = self.datamodule.state_dict()
        if there and there["tokenizer"] != here["tokenizer"]:
            raise UserError(
                f"{path} belongs to another tokenizer: data.tokenizer must give the one it was trained with"
            )
        if there and same and there["text_sha256"] != here["text_sha256"]:
            raise UserError(
                f"{self.run_folder} holds a run of another text: {self.datamodule.source.described} has changed since; "
                "give this one a --name of its own, or remove that folder"
            )

    def _check_same_run(self) -> None:
        """A folder's run goes on only with what it was begun with, as far as its numbers depend on it."""
        parser = self._parser(self.subcommand)
        begun = read_config(config_of(self.run_folder))
        named = self.options.ckpt_path
        if named not in (None, "last", begun.get("ckpt_path"), str(last_checkpoint_of(self.run_folder))):
            raise UserError(
                f"{self.run_folder} holds a run that was not begun with ckpt_path {named}; "
                "give this one a --name of its own, or leave that option out to go on with the run"
            )
        now = yaml.safe_load(parser.dump(self.options, skip_unset=False))
        defaults = yaml.safe_load(parser.dump(parser.get_defaults(), skip_unset=False, skip_validation=True))
        for group in ("seed_everything", "model", "data", "trainer"):
            there, here = begun.get(group), now[group]
            if isinstance(there, dict):
                there = defaults[group] | there  # what an option that is new since then would have been
                bound = (BOUND if group == "trainer" else there.keys() | here.keys()) - FREE.get(group, set())
                there, here = ({key: value for key, value in c.items() if key in bound} for c in (there, here))
            if changed := difference(there, here, group):
                raise UserError(
                    f"{self.run_folder} holds a run of another configuration ({changed}); "
                    "give this one a --name of its own, or remove that folder"
                )


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
        for group, option in (("trainer", "max_steps"), ("data", "context_length"), ("model", "positions")):
            config[group][option]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is missing or damaged, so what the checkpoints beside it were trained with is not known; "
            "remove that folder, or give this run a --name of its own"
        ) from error
    return config


def main(args: list[str] | None = None, data: type[Any] = TextData, prog: str = "python -m train") -> None:
    for noise in (
        "does not have many workers",
        "exists and is not empty",
        r"isinstance\(treespec, LeafSpec\)",
        "your dataloader is not resumable",  # it is: `RandomBatches` depends on the step alone
        "Be aware that when using `ckpt_path`, callbacks",  # which may change, ...
        "The dirpath has changed",  # ... as a run's folder may
        "re using the WeightAveraging callback",  # of averaged weights: they are what a checkpoint's state_dict holds
    ):
        warnings.filterwarnings("ignore", f".*{noise}")
    for part in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(part).setLevel(logging.WARNING)
    set_parsing_settings(import_path_denylist=[])  # jsonargparse's own list, such as os and subprocess, in force
    with told_in_one_line():
        RunCLI(
            LanguageModel,
            data,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"use_distributed_sampler": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": prog,
                "description": "Train, validate or test a language model from YAML.",
                "exit_on_error": False,
            },
            args=args,
        )


if __name__ == "__main__":
    main()
