"""`python -m train fit --config configs/xpos.yaml`: train, validate and test from YAML with Lightning."""

import json
import logging
import sys
import warnings
from enum import Enum
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt, restricted_number_type
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from train.callbacks import (
    NO_EPOCHS,
    LastCheckpoint,
    OneLineProgressBar,
    SampleText,
    Throughput,
    check_callbacks,
    check_chosen,
)
from train.checkpoint import (
    ADDED,
    DATA,
    FREE,
    CheckpointFiles,
    difference,
    find_checkpoint,
    last_checkpoint_of,
    load_checkpoint,
)
from train.data import TextData
from train.errors import UserError, errors_in_one_line
from train.files import locked, replacing
from train.language_model import UNSET_SCALE_BASE, LanguageModel
from xpos_zoo import XPOS

CALLBACKS = (SampleText, Throughput)  # imported, so that YAML can name them without their module
DEFAULTS = Path(__file__).parents[1] / "configs" / "cpu.yaml"
# The trainer's options that a run's numbers depend on.
BOUND = {"max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision"}
# The model's options in which a checkpoint may differ from the model that it is loaded into.
TRAINING = FREE | {"learning_rate", "warmup_steps", "weight_decay", "schedule", "dropout", "_instantiator"}
# Options of the trainer that change which batches are drawn, and all that they may be.
FIXED: dict[str, tuple[Any, ...]] = {
    "limit_train_batches": (None, 1.0),
    "overfit_batches": (0, 0.0),
    "max_epochs": (None, -1),
    "min_epochs": (None, 0),
    "check_val_every_n_epoch": (None, 1),
    "reload_dataloaders_every_n_epochs": (0,),
    "use_distributed_sampler": (False,),
}
LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "log_every_n_steps": 0, "num_sanity_val_steps": -1}
LENGTHS = {"context_length", "block_size", "window_size"}
ANOTHER_NAME = "give this one a --name of its own, or remove that folder"

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])  # what NumPy takes


class RunCLI(LightningCLI):
    """Lightning's command line, with a folder a run: <runs>/<name>/seed<seed>.

    `fit` goes on from the folder's last checkpoint, and does nothing if that run is finished; `validate` and `test`
    read it. A folder that holds a run of another model, data, seed or number of steps is left alone.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only", "ckpt_path"} for name in ("fit", "validate", "test")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=Seed, default=1, help="Seed of weights and of the data's order.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; default: the config's.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder for all runs.")
        parser.add_argument(
            "--checkpoint",
            type=str | None,
            default=None,
            help="For fit, what a new run begins from; for validate and test, what is measured, by default the run.",
        )
        parser.add_argument(
            "--allow_changed_text",
            type=bool,
            default=False,
            help="For validate and test: measure, with a note, also text that may have been trained on.",
        )
        parser.add_argument("--save_every", type=PositiveInt, default=100, help="Steps from one last.ckpt to the next.")
        parser.link_arguments("data.context_length", "model.context_length")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, after giving each layer of XPOS that has no scale_base one: model.scale_base, or half the length.

        Only the arguments by themselves tell a scale_base that is not given from the library's default.
        """
        args = sys.argv[1:] if args is None else args
        plain = [each for each in args if not each.startswith("--print_config")]
        everything = parser.parse_args(plain)
        command = everything.subcommand
        linked = {name: everything[f"{command}.{name}"] for name in ("data.context_length", "seed_everything")}
        given = parser.parse_args(plain, namespace=Namespace({command: Namespace(linked)}), defaults=False)[command]
        model = vars(everything[command].model)
        positions = resolve_positions(model, given.get("model", Namespace()), linked["data.context_length"] / 2)
        if "scale_base" in str(positions):
            args = [*args, f"--model.positions={json.dumps(positions)}", "--model.scale_base=null"]
        super().parse_arguments(parser, args)

    @property
    def options(self) -> Any:
        return self.config[str(self.subcommand)]

    @property
    def run_folder(self) -> Path:
        return Path(self.options.runs) / self.options.name / f"seed{self.options.seed_everything}"

    def before_instantiate_classes(self) -> None:
        if not self.options.name:
            self.options.name = Path(str(self.options.config[-1])).stem if self.options.config else "unnamed"
        options = self.options.trainer
        if options.max_steps <= 0:
            raise UserError(f"trainer.max_steps must be above 0, got {options.max_steps}: {NO_EPOCHS}")
        for name, allowed in FIXED.items():
            if str(options[name]) not in map(str, allowed):  # 1 batch is not 1.0 of all
                right = "null" if allowed[0] is None else allowed[0]
                raise UserError(f"trainer.{name} must be {right}, got {options[name]}: {NO_EPOCHS}")
        for name, least in LEAST.items():
            if options[name] is not None and not options[name] >= least:
                raise UserError(f"trainer.{name} must be {least} or above, got {options[name]}")
        interval, batches = options.val_check_interval, options.max_steps * options.accumulate_grad_batches
        if isinstance(interval, int | float) and interval <= 0:
            raise UserError(f"trainer.val_check_interval must be above 0, got {interval}")
        if isinstance(interval, int) and options.check_val_every_n_epoch is not None and interval > batches:
            raise UserError(
                f"trainer.val_check_interval must be at most the training's {batches} batches, got {interval}; "
                "or set trainer.check_val_every_n_epoch to null"
            )
        check_chosen(options)
        strategy = {} if isinstance(options.strategy, str) else options.strategy.get("init_args", {})
        for name, right in (("tensor_parallel_size", 1), ("save_distributed_checkpoint", False)):
            if (given := strategy.get(name, right)) != right:  # no layer is split, and a checkpoint is one file
                raise UserError(f"trainer.strategy.{name} must be {right}, got {given}")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        devices, sharing = self.trainer.num_devices * self.trainer.num_nodes, self.model.options.context_parallel_size
        if sharing < 1 or devices % sharing:
            raise UserError(f"model.context_parallel_size must divide the devices, {devices}, got {sharing}")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        folder, options = self.run_folder, self.options.trainer
        if options.logger is None:
            loggers = [TensorBoardLogger(folder, name=None, version="tensorboard"), CSVLogger(folder, name="metrics")]
            kwargs["logger"] = self.subcommand == "fit" and loggers
        if options.plugins is None:
            kwargs["plugins"] = [CheckpointFiles()]
        given, own = self.config_init[str(self.subcommand)].trainer.callbacks or [], []
        bars = [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, ProgressBar)]
        if options.enable_progress_bar is not False and not bars:
            own.append(OneLineProgressBar())
        if options.enable_checkpointing is not False and not options.fast_dev_run:
            own.append(LastCheckpoint(last_checkpoint_of(folder), self.options.save_every))
        self.trainer_defaults["callbacks"] = own
        return super().instantiate_trainer(default_root_dir=str(folder), **kwargs)

    def fit(self, **kwargs: Any) -> None:
        folder, steps = self.run_folder, self.trainer.max_steps
        check_callbacks(self.trainer, self.datamodule)
        if self.options.allow_changed_text:
            raise UserError("allow_changed_text is for validate and test, not for fit")
        last = last_checkpoint_of(folder)
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[str(self.subcommand)]
        if last.exists():
            check_same_run(folder, config)
        begin = last if last.exists() else self.options.checkpoint and find_checkpoint(self.options.checkpoint)
        checkpoint = self._checkpoint(begin) if begin else None
        how = "begins"
        if checkpoint is not None:
            if "optimizer_states" not in checkpoint:
                raise UserError(f"{begin} holds weights alone; training goes on only with the optimizer's state")
            done = checkpoint["global_step"]
            early = any(s.get("stopping_reason_message") for s in checkpoint.get("callbacks", {}).values())
            if done >= steps or (early and self.trainer.early_stopping_callbacks):
                print(f"{begin} is finished, with {done} of {steps} steps; nothing to train in {folder}")
                return
            how = f"ended early, after step {done}; resumes" if begin == last else f"begins at step {done}"
        self.datamodule.setup("fit")  # complains about the text before the trainer writes its first file
        if checkpoint is not None:
            self._check_text(checkpoint, begin)
        self.model.check_batches(self.datamodule.val_dataloader().dataset)
        busy = f"{folder} is being trained by another process; wait for it, or end it"
        if self.trainer.is_global_zero:  # of several processes of one training, the first stands for all
            with locked(folder / ".lock", busy):
                with replacing(folder / "config.yaml") as draft:
                    draft.write_text(yaml.safe_dump(config, sort_keys=False))
                self._train(begin, how, **kwargs)
        else:
            self._train(begin, how, **kwargs)

    def _train(self, begin: Path | None, how: str, **kwargs: Any) -> None:
        trainer: Any = self.trainer
        folder, steps = self.run_folder, trainer.max_steps
        trainer.print(f"{folder}: {how}, to step {steps} on {trainer.strategy.root_device}")
        try:
            trainer.fit(weights_only=True, ckpt_path=begin, **kwargs)
        except SystemExit:  # how Lightning ends after an interruption
            raise KeyboardInterrupt from None
        stopped = any(each.stopping_reason_message for each in trainer.early_stopping_callbacks)
        if early := trainer.should_stop and not stopped and trainer.global_step < steps:
            trainer.print(f"{folder}: ended early, after step {trainer.global_step}; the same command resumes it")
        saved = any(isinstance(each, LastCheckpoint) and each.ended_early for each in trainer.callbacks)
        if trainer.checkpoint_callback and not self.options.trainer.fast_dev_run and not (early and saved):
            trainer.save_checkpoint(last_checkpoint_of(folder), weights_only=False)

    def validate(self, **kwargs: Any) -> None:
        self.trainer.validate(weights_only=True, ckpt_path=self._trained("val"), **kwargs)

    def test(self, **kwargs: Any) -> None:
        self.trainer.test(weights_only=True, ckpt_path=self._trained("test"), **kwargs)

    def _trained(self, split: str) -> Path:
        """The checkpoint that is measured; says so if the split's text may not have been held out from its training."""
        path = find_checkpoint(self.options.checkpoint or str(self.run_folder))
        checkpoint = self._checkpoint(path)
        self._check_text(checkpoint, path)
        if isinstance(self.datamodule, TextData):
            trained = checkpoint.get(DATA, {}), checkpoint["datamodule_hyper_parameters"]
            note = self.datamodule.doubt(*trained, split, self.options.allow_changed_text)
            if note:
                self.trainer.print(f"note: {path}: {note}")
        return path

    def _checkpoint(self, path: Path) -> dict[str, Any]:
        """The checkpoint, which is one of this model, though it may have been trained otherwise."""
        checkpoint = load_checkpoint(path)
        free, both = TRAINING | LENGTHS, (checkpoint["hyper_parameters"], self.model.hparams)
        there, here = (ADDED | {k: v for k, v in each.items() if k not in free} for each in both)
        if changed := difference(there, here, "model"):
            raise UserError(f"{path} belongs to another model: {changed}")
        return checkpoint

    def _check_text(self, checkpoint: dict[str, Any], path: Path) -> None:
        """A checkpoint's tokens must mean what they mean here; a run goes on with the same text, too."""
        there, here = checkpoint.get(type(self.datamodule).__qualname__), self.datamodule.state_dict()
        if there and there["tokenizer"] != here["tokenizer"]:
            raise UserError(f"{path} belongs to another tokenizer than {self.options.data.tokenizer} (data.tokenizer)")
        same_run = self.subcommand == "fit" and path == last_checkpoint_of(self.run_folder)
        if there and same_run and there["text_sha256"] != here["text_sha256"]:
            raise UserError(f"{self.run_folder} holds a run of another text: it has changed since; {ANOTHER_NAME}")


def resolve_positions(model: dict[str, Any], given: Any, default: float) -> Any:
    """The positions among a model's options, each layer of XPOS with a scale_base; `given` are the options given."""
    missing = model.keys() - vars(given).keys()  # all but what is new are in the config.yaml of a run of 0.2.0
    recorded_by_0_2 = bool(missing & ADDED.keys()) and missing <= ADDED.keys() | FREE | {"context_length", "vocab_size"}
    scale_base = default if model["scale_base"] is None else model["scale_base"]

    def resolve(layer: Any, own: Any) -> Any:
        if not isinstance(layer, Namespace):
            paths = {"class_path": "xpos_zoo.XPOS", "init_args": {"scale_base": scale_base}}
            return paths if layer is XPOS else f"{layer.__module__}.{layer.__qualname__}"
        kind, arguments = locate(layer.class_path), vars(layer.get("init_args", Namespace()))
        chosen = own.get("init_args", {}).get("scale_base")
        unset = chosen is None or (recorded_by_0_2 and chosen == UNSET_SCALE_BASE)
        if "scale_base" in arguments and unset and isinstance(kind, type) and issubclass(kind, XPOS):
            arguments = arguments | {"scale_base": scale_base}
        return {"class_path": layer.class_path} | ({"init_args": arguments} if arguments else {})

    layers, own = model["positions"], given.get("positions")
    if isinstance(layers, list):
        return [resolve(*pair) for pair in zip(layers, own, strict=True)]
    return resolve(layers, own)


def what_counts(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that its numbers depend on."""
    free = FREE | {"positions", "scale_base"}  # of which the checkpoint says what was used
    counts = {group: {k: v for k, v in config[group].items() if k not in free} for group in ("model", "data")}
    counts["model"] = ADDED | counts["model"]
    trainer = {name: config["trainer"][name] for name in BOUND}
    return counts | {"seed_everything": config["seed_everything"], "trainer": trainer}


def check_same_run(folder: Path, config: dict[str, Any]) -> None:
    """A folder's run goes on only with what it was begun with, as far as its numbers depend on it."""
    path = folder / "config.yaml"
    try:
        begun = what_counts(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is missing or damaged, so its run cannot go on; {ANOTHER_NAME}") from error
    if changed := difference(begun, what_counts(config)):
        raise UserError(f"{folder} holds a run of another configuration ({changed}); {ANOTHER_NAME}")


def main(args: list[str] | None = None, data: type[Any] = TextData, prog: str = "python -m train") -> None:
    for noise in (
        "args parameter is intended to run from within Python",  # as the tests do
        "does not have many workers",
        "exists and is not empty",
        r"isinstance\(treespec, LeafSpec\)",
        "your dataloader is not resumable",  # it is: `RandomBatches` depends on the step alone
        "Be aware that when using `ckpt_path`, callbacks",  # which may change, ...
        "The dirpath has changed",  # ... as a run's folder may
        "re using the WeightAveraging callback",  # of averaged weights: they are what a checkpoint's state_dict holds
    ):
        warnings.filterwarnings("ignore", f".*{noise}")
    # Where jsonargparse saves a list as a function, which it is not: as an error, it goes on to what it is.
    warnings.filterwarnings("error", "(?s).*Unable to serialize instance")
    # The defaults of some callbacks are members of an Enum.
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
    for part in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(part).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.callbacks").setLevel(logging.INFO)  # what ModelSummary, for one, shows
    set_parsing_settings(import_path_denylist=[])  # jsonargparse's own list, such as os and subprocess, in force
    defaults = {"default_config_files": [str(DEFAULTS)], "exit_on_error": False}
    with errors_in_one_line():
        RunCLI(
            LanguageModel,
            data,
            save_config_callback=None,
            trainer_defaults={"use_distributed_sampler": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": prog,
                "description": "Train, validate or test a language model from YAML.",
                "exit_on_error": False,
                **dict.fromkeys(RunCLI.subcommands(), defaults),
            },
            args=args,
        )


if __name__ == "__main__":
    main()
