"""`python -m train fit --config configs/xpos.yaml`: train, validate and test from YAML with Lightning."""

import warnings
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from train.checkpoint import check_fits, load_checkpoint
from train.errors import UserError, told_in_one_line
from train.language_model import DEFAULT_SCALE_BASE, LanguageModel
from train.text import TextData


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration of a training into its run folder."""

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.parser.save(
                self.config, config_of(Path(trainer.default_root_dir)), skip_none=False, overwrite=True, multifile=False
            )


def config_of(run: Path) -> Path:
    return run / "config.yaml"


def last_checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


class ProgressBar(TQDMProgressBar):
    """Without Lightning's v_num, the end of a logger's name."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class RunCLI(LightningCLI):
    """Lightning's command line, with a folder a run: <runs>/<name>/seed<seed>.

    `fit` goes on from the folder's last checkpoint, and does nothing if that run is finished; `validate` and `test`
    read it. A folder that holds a run of another model, data or seed is left alone.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; default: the config's.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder for all runs.")
        parser.link_arguments("data.context_length", "model.context_length")
        parser.link_arguments("seed_everything", "data.seed")

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
        positions = self.options.model.positions
        if (positions.get("init_args") or {}).get(
            "scale_base"
        ) == DEFAULT_SCALE_BASE:  # record what LanguageModel makes of it
            given = self.options.model.scale_base
            positions.init_args.scale_base = self.options.data.context_length / 2 if given is None else given

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder = self.run_folder
        if self.options.trainer.logger is None:
            kwargs["logger"] = self.subcommand == "fit" and [
                TensorBoardLogger(folder, name=None, version="tensorboard"),
                CSVLogger(folder, name="metrics"),
            ]
        trainer = super().instantiate_trainer(default_root_dir=str(folder), **kwargs)
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "dirpath", "") is None:
                callback.dirpath = str(last_checkpoint_of(folder).parent)  # type: ignore[attr-defined]
        return trainer

    def fit(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        last = last_checkpoint_of(self.run_folder)
        if ckpt_path is None and last.exists():
            self._check_same_run()
            ckpt_path = str(last)
        if ckpt_path is not None and self._checkpoint(ckpt_path)["global_step"] >= self.trainer.max_steps:
            print(f"{self.run_folder} is finished: {ckpt_path} has all {self.trainer.max_steps} steps")
            return
        self.trainer.fit(weights_only=True, ckpt_path=ckpt_path, **kwargs)
        if self.trainer.global_step >= self.trainer.max_steps:
            self.trainer.save_checkpoint(last, weights_only=False)

    def validate(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        self.trainer.validate(weights_only=True, ckpt_path=self._trained(ckpt_path), **kwargs)

    def test(self, ckpt_path: str | None = None, **kwargs: Any) -> None:
        self.trainer.test(weights_only=True, ckpt_path=self._trained(ckpt_path), **kwargs)

    def _trained(self, ckpt_path: str | None) -> str:
        ckpt_path = ckpt_path or str(last_checkpoint_of(self.run_folder))
        self._checkpoint(ckpt_path)
        return ckpt_path

    def _checkpoint(self, path: str) -> dict[str, Any]:
        checkpoint = load_checkpoint(Path(path))
        check_fits(checkpoint["state_dict"], self.model, Path(path))
        return checkpoint

    def _check_same_run(self) -> None:
        """A folder's run goes on only with the model, data and seed that it was begun with."""
        path = config_of(self.run_folder)
        begun = yaml.safe_load(path.read_text())
        now = yaml.safe_load(self._parser(self.subcommand).dump(self.options, skip_none=False))
        for group in ("seed_everything", "model", "data"):
            if begun.get(group) != now.get(group):
                raise UserError(
                    f"{self.run_folder} holds a run of another configuration ({difference(begun, now, group)}); "
                    "give this one a --name of its own, or remove that folder"
                )


def difference(begun: dict[str, Any], now: dict[str, Any], key: str) -> str:
    """The first setting in which two configurations differ below `key`, in words."""
    old, new = begun.get(key), now.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
        return f"{key}.{difference(old, new, inner)}"
    return f"{key}: {old} there, {new} here"


def main(args: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    with told_in_one_line():
        RunCLI(
            LanguageModel,
            TextData,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=1,
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [ProgressBar()]},
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
            args=args,
        )


if __name__ == "__main__":
    main()
