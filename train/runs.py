"""The runs that a measurement is given: found, read, and comparable with each other."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import difference, load_checkpoint
from train.errors import UserError
from train.language_model import LanguageModel
from train.text import CACHE, TextData
from xpos_zoo import Transformer

ENCODINGS = {"XPOS": "xPos", "RotaryEmbedding": "RoPE", "NoPositions": "no positions"}  # as the literature calls them


@dataclass(frozen=True)
class Task:
    """What a model is trained for: the command that trains it, and which settings of its data decide on the targets.

    Those that are `seldom` set stand here with their defaults, and in a run's data where it has them otherwise.
    """

    command: str
    data: tuple[str, ...]
    seldom: tuple[tuple[str, Any], ...] = ()


TEXT = Task(
    "python -m train fit",
    ("context_length", "paths", "val_fraction", "test_fraction", "split_by"),
    (("dataset", None), ("field", "text"), ("id_field", None), ("tokenizer", "bytes"), ("tokenizer_size", None)),
)


@dataclass(frozen=True)
class Run:
    """A training: its folder, its encoding and seed, where its weights are, after how many steps, and from what.

    `data` is what decides on the targets, `cache` is where text is kept, and `tokenizer` what its tokenizer.json holds.
    """

    folder: Path
    checkpoint: Path
    encoding: str
    seed: int
    steps: int
    data: dict[str, Any]
    recipe: dict[str, Any]  # all else that seeds of one encoding share
    positions: dict[str, Any]  # of the recipe, what encodings may differ in
    cache: str = CACHE
    tokenizer: str | None = None

    def text(self) -> TextData:
        """The text that it was trained on.

        Raises:
            UserError: its tokens are not what they were.
        """
        text = TextData(**self.data, cache=self.cache)
        if text.corpus.tokenizer.to_json() != self.tokenizer:
            given = self.data.get("tokenizer", "bytes")
            raise UserError(f"{self.folder} was trained with another tokenizer than {given} gives now")
        return text

    def model(self, device: torch.device) -> Transformer:
        try:
            module = LanguageModel.load_from_checkpoint(self.checkpoint, map_location=device, weights_only=True)
        except RuntimeError as error:
            raise UserError(f"{self.checkpoint} does not hold the weights of its own model: {error}") from error
        return module.transformer.eval()


def find_runs(folders: list[str], task: Task = TEXT) -> list[Run]:
    """The runs of the task in and below the folders.

    Raises:
        UserError: a folder does not exist or holds no run, a checkpoint is damaged or of another task, or
            the runs are not comparable, or not trained at a length that has quarters.
    """
    paths: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"runs: there is no folder {str(folder)!r}")
        checkpoints = sorted(folder.rglob("checkpoints/last.ckpt"))
        if not checkpoints:
            raise UserError(f"runs: there is no checkpoint in {str(folder)!r}; `{task.command}` writes one")
        for path in checkpoints:
            paths.setdefault(path.resolve(), path)
    runs = [read_run(path, task) for path in paths.values()]
    if (length := runs[0].data["context_length"]) % 4:
        raise UserError(f"runs: the context length must be a multiple of 4, got {length}")
    for run in runs[1:]:
        if run.data != runs[0].data:
            raise UserError(
                f"runs: {run.folder} and {runs[0].folder} differ in data or context length, so they have no common "
                f"targets: {run.data} and {runs[0].data}"
            )
        if run.steps != runs[0].steps:
            raise UserError(
                f"runs: {run.folder} has {run.steps} steps and {runs[0].folder} has {runs[0].steps}; "
                f"`{task.command}` goes on with one that was interrupted"
            )
        if run.tokenizer != runs[0].tokenizer:
            raise UserError(
                f"runs: {run.folder} and {runs[0].folder} have tokenizers that differ, so no common targets"
            )
        if changed := difference(run.recipe, runs[0].recipe):
            raise UserError(f"runs: {runs[0].folder} is trained otherwise than {run.folder} ({changed})")
    for run, other in combinations(runs, 2):
        if run.encoding == other.encoding:
            if changed := difference(run.positions, other.positions):
                raise UserError(f"runs: {other.folder} is no seed of the model in {run.folder} ({changed})")
            if run.seed == other.seed:
                raise UserError(f"runs: {run.folder} and {other.folder} are both seed {run.seed} of {run.encoding}")
    return runs


def read_run(path: Path, task: Task) -> Run:
    content = load_checkpoint(path)
    data, model = content["datamodule_hyper_parameters"], content["hyper_parameters"]
    if lacking := [name for name in task.data if name not in data]:
        raise UserError(f"runs: {path} has no data.{lacking[0]}: it is no run of `{task.command}`, or an older one")
    layers = model["positions"] if isinstance(model["positions"], list) else [model["positions"]]
    encodings = [str(layer["class_path"]).rpartition(".")[2] for layer in layers]
    apart = {"positions", "scale_base", "context_length", "vocab_size", "compile", "_instantiator"}
    return Run(
        folder=path.parent.parent,
        checkpoint=path,
        encoding=" and ".join(dict.fromkeys(ENCODINGS.get(encoding, encoding) for encoding in encodings)),
        seed=data["seed"],
        steps=content["global_step"],
        data={name: data[name] for name in task.data}
        | {name: data[name] for name, default in task.seldom if data.get(name, default) != default},
        recipe={"batch_size": data["batch_size"], "separate_documents": data.get("separate_documents", False)}
        | {k: v for k, v in model.items() if k not in apart},
        positions={name: model[name] for name in ("positions", "scale_base")},
        cache=data.get("cache", CACHE),
        tokenizer=content.get(TextData.__qualname__, {}).get("tokenizer"),
    )
