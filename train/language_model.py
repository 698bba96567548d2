"""How is a language model trained? A `Transformer`, next-token prediction, AdamW, a schedule, for Lightning."""

import math
from collections.abc import Callable
from functools import partial
from pydoc import locate
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, default_collate

from train.errors import UserError
from train.tokens import BYTES
from xpos_zoo import XPOS, PositionModule, RotaryEmbedding, Transformer
from xpos_zoo.pretrained import Named, from_named

POSITIONS = (XPOS, RotaryEmbedding)  # imported, so that YAML can name them without their module
UNSET_SCALE_BASE = 512  # XPOS's own default, which belongs to a training length of 1024
TRAIN_METRICS = ("train_bits_per_byte", "train_nats_per_token")
VAL_METRICS = ("val_bits_per_byte", "val_nats_per_token", "val_accuracy")
IGNORED = -100  # a target that is not predicted
LOWEST = 0.1  # of the learning rate's peak, where it ends
DECAY = 0.2  # the share of steps over which it falls in the schedule wsd
GRAPHS = 8  # of a compiled layer, at most: with and without gradients, a last batch that is smaller

Positions = Callable[[int], PositionModule]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
# Windows (b, n + 1), each token of which but the first is predicted; or inputs, targets and, where tokens see none of
# another document, the number of each input's document, (b, n) each.
Batch = Tensor | tuple[Tensor, ...] | list[Tensor]


class LanguageModel(L.LightningModule):
    """A `Transformer` with AdamW and a learning rate that rises linearly, then falls.

    Weights that are not finite end the training where a checkpoint would be written, and reach none.

    Args:
        context_length: training length L; the data's own.
        positions: the position module's class, or anything that gives one for a head_dim, such as `XPOS` or
            `RotaryEmbedding`; or a list with one for each layer.
        scale_base: of layers of XPOS that have none of their own in `positions`: by default half the context length,
            where the authors' 512 for 1024 puts it.
        embed_dim, num_layers, num_heads, num_kv_heads, hidden_dim, qk_norm, output_gate, dropout: see
            `Transformer`.
        block_size: of blockwise attention, or null for dense; or a list with one for each layer.
        window_size: of a sliding window, in place of block_size; likewise.
        query_scaling: what multiplies queries, likewise: `{name: ScalableSoftmax, trained_length: 128}`.
        distance_bias: what logits become by distance: a class of the library, such as `ScaleInvariant`, with arguments
            `{name: ScaleInvariant, tau: 10}`; an import path, `{class_path: mine.Bias, init_args: {}}`; or a list with
            one for each layer.
        learning_rate: at the end of the warm-up.
        warmup_steps: steps over which the learning rate rises to it.
        schedule: what it does from then on: falls to a tenth as a cosine, falls there linearly, stays constant, or
            (wsd: warm-up, stable, decay) stays until the last fifth of all steps, and falls linearly over these.
        weight_decay: on matrices; none on norms.
        compile: whether each layer is compiled (a graph a layer, which works under every strategy).
        checkpoint_activations: keep a layer's input alone for the backward pass, and compute the rest again.
        context_parallel_size: how many devices share each window of text.
        vocab_size: how many tokens there are; the data's own.

    Raises:
        ValueError: a size or rate is out of range, or positions give no `PositionModule`.
    """

    def __init__(
        self,
        context_length: int,
        positions: Positions | list[Positions] = XPOS,
        scale_base: float | None = None,
        embed_dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        block_size: int | list[int | None] | None = None,
        window_size: int | list[int | None] | None = None,
        query_scaling: Named | str | list[Named | str | None] | None = None,
        distance_bias: Named | str | list[Named | str | None] | None = None,
        qk_norm: bool = False,
        output_gate: bool = False,
        dropout: float = 0.0,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        compile: bool = False,
        schedule: Schedule = "cosine",
        checkpoint_activations: bool = False,
        context_parallel_size: int = 1,
        vocab_size: int = BYTES,
    ):
        super().__init__()
        if not 0 < learning_rate < math.inf:
            raise UserError(f"model.learning_rate must be above 0 and finite, got {learning_rate}")
        if warmup_steps < 1:
            raise UserError(f"model.warmup_steps must be 1 or above, got {warmup_steps}")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"model.weight_decay must be 0 or above and finite, got {weight_decay}")
        self.save_hyperparameters()
        self.options: Any = self.hparams
        self.seed = torch.initial_seed()  # of dropout
        half = context_length / 2 if scale_base is None else scale_base
        self.transformer = Transformer(
            vocab_size,
            embed_dim,
            num_layers,
            num_heads,
            num_kv_heads=num_kv_heads,
            positions=[with_scale_base(each, half) for each in positions]
            if isinstance(positions, list)
            else with_scale_base(positions, half),
            block_size=block_size,
            window_size=window_size,
            query_scaling=make_setting("query_scaling", query_scaling),
            distance_bias=make_setting("distance_bias", distance_bias),
            qk_norm=qk_norm,
            output_gate=output_gate,
            hidden_dim=hidden_dim,
            dropout=dropout,
        )
        for attention in self.transformer.attentions:
            blocks, windows = (
                context_parallel_size * (size or 1) for size in (attention.block_size, attention.window_size)
            )
            if context_parallel_size > 1 and (context_length % blocks or context_length < windows):
                raise UserError(
                    "data.context_length must be a multiple of model.context_parallel_size * model.block_size and at "
                    f"least model.context_parallel_size * model.window_size, got {context_length} with "
                    f"{context_parallel_size}, {attention.block_size or 'null'} and {attention.window_size or 'null'}"
                )
            if attention.distance_bias is not None:
                heads = attention.distance_bias(torch.zeros(1, 1, 1, 1, dtype=torch.int64)).shape[-3]
                if heads not in (1, num_heads):
                    raise UserError(f"model.num_heads is {num_heads}, but a distance bias is made for {heads}")
        xpos = [each.positions for each in self.transformer.attentions if isinstance(each.positions, XPOS)]
        for module in xpos:  # a checkpoint of 0.2.0 has this default there, and its own value apart
            if scale_base is not None and module.scale_base == UNSET_SCALE_BASE:
                module.scale_base = scale_base
        if scale_base is not None and not xpos:
            raise UserError(f"model.scale_base is {scale_base:g}, but no layer has XPOS")
        self.transformer.checkpoint_activations = checkpoint_activations

    def setup(self, stage: str) -> None:
        size, world = self.options.context_parallel_size, self.trainer.world_size
        if size > 1:
            device = self.trainer.strategy.root_device.type
            mesh = init_device_mesh(device, (world // size, size), mesh_dim_names=("data", "context"))
            self.transformer.cp_mesh = mesh["context"]

    def configure_model(self) -> None:
        layers = self.transformer.layers
        if self.options.compile:
            # All layers are one function to the compiler, and each kind of layer has graphs of its own.
            config: Any = torch.compiler.config
            config.recompile_limit = max(config.recompile_limit, GRAPHS * len(layers))
        for layer in layers:
            if self.options.compile and layer._compiled_call_impl is None:
                layer.compile(fullgraph=True)
        if self.device_mesh is not None:  # of Lightning's ModelParallelStrategy
            for module in (*layers, self.transformer):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self.transformer(tokens, document_ids=document_ids)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (b n, vocabulary) and targets (b n,), of this device's part of the windows."""
        whole = (batch[:, :-1], batch[:, 1:]) if isinstance(batch, Tensor) else batch
        mesh = self.transformer.cp_mesh
        own = whole if mesh is None else [t.chunk(mesh.size(), dim=1)[mesh.get_local_rank()] for t in whole]
        inputs, targets, *document_ids = own
        logits = self(inputs, *document_ids).flatten(0, 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()

    def check_batches(self, windows: Dataset[Any]) -> None:
        """Raise what the model has against batches of these windows, such as a ValueError; a few tokens show it."""
        batch = default_collate([windows[0]])
        few = batch[:, :3] if isinstance(batch, Tensor) else tuple(part[:, :2] for part in batch)
        with torch.no_grad():
            self.eval().predictions(few)
        self.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = cross_entropy(*self.predictions(batch), ignore_index=IGNORED)
        shared = self.options.context_parallel_size > 1  # then a device's loss is of other places than the next one's
        bits = self._bits_per_byte("train", loss.detach())
        self.log("train_bits_per_byte", bits, prog_bar=True, sync_dist=shared)
        self.log("train_nats_per_token", loss.detach(), sync_dist=shared)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        logits, targets = self.predictions(batch)
        loss = cross_entropy(logits, targets, ignore_index=IGNORED)
        accuracy = (logits.argmax(-1) == targets)[targets != IGNORED].float().mean()
        self.log(f"{split}_bits_per_byte", self._bits_per_byte(split, loss), prog_bar=split == "val", sync_dist=True)
        self.log_dict({f"{split}_accuracy": accuracy, f"{split}_nats_per_token": loss}, sync_dist=True)

    def _bits_per_byte(self, split: str, loss: Tensor) -> Tensor:
        """Of a loss in nats a token; data that does not say how many tokens a byte has has one."""
        tokens_per_byte = getattr(getattr(self.trainer, "datamodule", None), "tokens_per_byte", None)
        return loss / math.log(2) * (1.0 if tokens_per_byte is None else tokens_per_byte(split))

    def configure_optimizers(self) -> Any:
        options, steps = self.options, int(self.trainer.estimated_stepping_batches)
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        # A fused optimizer unscales float16 gradients in its step, after they are clipped; others have it done before.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=fused)
        scheduler = LambdaLR(optimizer, partial(schedule_factor, options.schedule, options.warmup_steps, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own refuses a fused optimizer under mixed precision.
        if gradient_clip_val:
            by_value = gradient_clip_algorithm == "value"
            clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
            clip(self.parameters(), gradient_clip_val)

    def on_train_start(self) -> None:
        """A run that begins from another one's checkpoint goes on at that step, with rates of its own."""
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        own = self.configure_optimizers()
        factor = own["lr_scheduler"]["scheduler"].lr_lambdas[0](self.global_step)
        config.scheduler.base_lrs = [self.options.learning_rate] * len(optimizer.param_groups)
        for group, mine in zip(optimizer.param_groups, own["optimizer"].param_groups, strict=True):
            rates = {name: value for name, value in mine.items() if name not in ("params", "lr")}
            group.update(rates, lr=self.options.learning_rate * factor)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout, as the data, depends on these alone: a run that goes on draws what it would have drawn.
        sequence = np.random.SeedSequence((self.seed, batch_idx, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, weight in checkpoint["state_dict"].items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise UserError(
                    f"{name} is not finite after step {checkpoint['global_step']}; training stopped, and its last "
                    "checkpoint is from before that; try a lower model.learning_rate or trainer.gradient_clip_val, "
                    "under a --name of its own"
                )


def with_scale_base(positions: Positions, scale_base: float) -> Positions:
    """Positions that give XPOS this scale_base, unless they have one of their own."""
    made_by, own = (positions.func, positions.keywords) if isinstance(positions, partial) else (positions, {})
    return partial(positions, scale_base=scale_base) if made_by is XPOS and "scale_base" not in own else positions


def make_setting(kind: str, value: Any) -> Any:
    """A query scaling or distance bias as YAML has it: a name, a name with arguments, an import path with arguments, or
    a list of these."""
    if isinstance(value, list):
        return [make_setting(kind, layer) for layer in value]
    if isinstance(value, str):
        return from_named(kind, {"name": value})
    if isinstance(value, dict) and "class_path" in value:
        made_by = locate(str(value["class_path"]))
        if not callable(made_by):
            raise UserError(f"model.{kind} must have the import path of a class, got {value['class_path']!r}")
        return made_by(**value.get("init_args", {}))
    return from_named(kind, value)


def schedule_factor(schedule: Schedule, warmup: int, steps: int, step: int) -> float:
    """The learning rate of a step (0, 1, ...), as a share of its peak."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    begin = warmup if schedule != "wsd" else max(warmup, steps - max(1, round(steps * DECAY)))
    gone = min(1.0, max(0, step - begin) / max(1, steps - begin))
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * gone)) / 2
        case _:
            return 1 - (1 - LOWEST) * gone
