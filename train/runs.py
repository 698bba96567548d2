"""Trained runs: found in folders, read, checked to be comparable, and loaded."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import DATA, EXPORTED, FREE, difference, load_trained, tokenizer_json_in
from train.data import TextData
from train.errors import UserError
from train.language_model import LanguageModel
from xpos_zoo import Transformer

# As the literature calls them, and what it calls them if slow pairs are left out.
ENCODINGS = {"XPOS": ("xPos", "partial xPos"), "RotaryEmbedding": ("RoPE", "p-RoPE"), "NoPositions": ("no positions",)}
# How a model attends.
OWN = ("positions", "block_size", "window_size", "query_scaling", "distance_bias", "qk_norm", "output_gate")


@dataclass(frozen=True)
class Run:
    """A training: its checkpoint, what tables call its position encoding, and what its numbers depend on."""

    checkpoint: Path
    encoding: str
    seed: int
    context_length: int
    data: dict[str, Any]
    recipe: dict[str, Any]  # what encodings share
    positions: dict[str, Any]  # what they differ in: how layers attend
    tokenizer: str | None
    sha256: str  # of the checkpoint
    text_hashes: dict[str, Any]

    def text(self) -> TextData:
        """The text that it was trained on; a UserError if its tokens are not what they were."""
        text = TextData(**self.data)
        if text.state_dict()["tokenizer"] != self.tokenizer:
            raise UserError(f"{self.checkpoint} has another tokenizer than data.tokenizer gives now")
        return text

    def doubt(self, text: TextData, allow_changed: bool) -> str:
        """Why the text for testing may not have been held out from this training; as `TextData.doubt`."""
        try:
            return text.doubt(self.text_hashes, self.data, "test", allow_changed)
        except UserError as error:
            raise UserError(f"{self.checkpoint}: {error}") from error

    def model(self, device: torch.device) -> Transformer:
        return load_model(self.checkpoint, device)


def load_model(path: Path, device: torch.device | str) -> Transformer:
    """The model of a checkpoint, or the exported one that a file beside it says is trained, in evaluation mode."""
    if path.name == EXPORTED:
        return Transformer.from_pretrained(path.parent, device=device)
    return LanguageModel.load_from_checkpoint(path, map_location=device, weights_only=True).transformer.eval()


def find_runs(folders: Iterable[str | Path], option: str = "paths") -> list[Run]:
    """The runs and exported models in and below the folders, each once; what else a run's folder holds is none.

    A UserError if a folder holds none, or one is damaged, or its data has no such option or a length without quarters.
    """
    paths: dict[Path, Path] = {}
    for folder in map(Path, folders):
        checkpoints = [*sorted(folder.rglob("checkpoints/last.ckpt")), *sorted(folder.rglob(EXPORTED))]
        if not checkpoints:
            raise UserError(f"runs: there is no trained run in {str(folder)!r}; `fit` makes one")
        paths |= {path.resolve(): path for path in checkpoints}
    homes = {path: path.parents[path.name != EXPORTED] for path in paths}
    outermost = [path for path in paths if set(homes.values()).isdisjoint(homes[path].parents)]
    runs = [read_run(paths[path]) for path in outermost]
    for run in runs:
        if option not in run.data:
            raise UserError(f"runs: {run.checkpoint} has no data.{option}: it was trained for something else")
        if run.context_length % 4:
            raise UserError(f"runs: the context length must be a multiple of 4, got {run.context_length}")
    return runs


def read_run(path: Path) -> Run:
    content, weights = load_trained(path), path.with_name("model.safetensors") if path.name == EXPORTED else path
    data = {k: v for k, v in content["datamodule_hyper_parameters"].items() if k != "_instantiator"}
    model = {k: v for k, v in content["hyper_parameters"].items() if k not in FREE | {"_instantiator"}}
    positions = {name: model.pop(name, None) or None for name in OWN}
    tokenizer = tokenizer_json_in(content)
    recipe = {"data": {k: v for k, v in data.items() if k not in FREE | {"seed"}}, "model": model}
    recipe |= {"steps": content["global_step"], "tokenizer": hashlib.sha256(str(tokenizer).encode()).hexdigest()[:8]}
    encoding, sha256 = encoding_of(**positions), hashlib.sha256(weights.read_bytes())
    own = (data["seed"], data["context_length"], data, recipe, positions, tokenizer)
    text = {name: value for name, value in content.get(DATA, {}).items() if name != "tokenizer"}
    return Run(path, encoding, *own, sha256.hexdigest(), text)


def encoding_of(
    positions: Any,
    query_scaling: Any = None,
    distance_bias: Any = None,
    qk_norm: bool | None = None,
    output_gate: bool | None = None,
    **_: Any,
) -> str:
    """What tables call a model that has these in its layers, such as "partial xPos, ScaleInvariant, QK-norm"."""

    def position_module(layer: dict[str, Any]) -> str:
        name, options = str(layer["class_path"]).rpartition(".")[2], layer.get("init_args") or {}
        return ENCODINGS.get(name, (name,))[-1 if options.get("max_wavelength") else 0]

    def logits(layer: Any) -> str:
        layer = {"name": layer} if isinstance(layer, str) else layer
        name = layer.get("name") or layer["class_path"].rpartition(".")[2]
        return name + (f", discount {layer['discount']:g}" if layer.get("discount") else "")

    each = [value if isinstance(value, list) else [value] for value in (positions, query_scaling, distance_bias)]
    names = [[position_module(layer) for layer in each[0]], *([logits(v) for v in own if v] for own in each[1:])]
    if names[0] == ["no positions"] and names[2][:1] in (["ALiBi"], ["ALiBiScaleInvariant"]):
        names[0], names[2] = ["ALiBi"], [name for name in ["ScaleInvariant"] if names[2] != ["ALiBi"]]
    names += [["QK-norm"]] if qk_norm else []
    names += [["gated"]] if output_gate else []
    return ", ".join(" and ".join(dict.fromkeys(own)) for own in names if own)


def check_comparable(runs: list[Run]) -> None:
    """Raise a UserError unless runs differ in encoding and seed alone, and no two are alike in both."""
    first: dict[str, Run] = {}
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        same, twin = first.setdefault(run.encoding, run), seen.setdefault((run.encoding, run.seed), run)
        for other, name in ((runs[0], "recipe"), (same, "positions")):
            if changed := difference(getattr(other, name), getattr(run, name)):
                raise UserError(f"runs: {run.checkpoint} is not comparable with {other.checkpoint} ({changed})")
        if twin is not run:
            raise UserError(f"runs: {run.checkpoint} and {twin.checkpoint} are both seed {run.seed} of {run.encoding}")
