"""The language model that Lightning trains: next-token prediction with a `Transformer`."""

import math
import re
from functools import partial
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from train.errors import UserError
from train.tokens import VOCAB_SIZE
from xpos_zoo import XPOS, PositionModule, RotaryEmbedding, Transformer

POSITIONS = (XPOS, RotaryEmbedding)  # imported, so that YAML can name them without their module
IGNORED = -100  # a target that is not predicted
FALL = 10  # the learning rate falls to its peak over this
GRAPHS = 8  # of a compiled layer, at most: with and without gradients, a last batch that is smaller
DECAY = 0.2  # the share of steps over which it falls in the schedule wsd

Schedule = Literal["cosine", "linear", "constant", "wsd"]

DIVERGED = (
    "training stopped, and its last checkpoint is from before that; "
    "try a lower model.learning_rate or trainer.gradient_clip_val, under a --name of its own"
)

# Windows (b, n + 1), each token of which but the first is predicted; or inputs, targets and, where tokens see none of
# another document, the number of each input's document, (b, n) each.
Batch = Tensor | tuple[Tensor, ...] | list[Tensor]


def random_numbers(device: str) -> Any:
    """The module that holds the random state of a kind of device."""
    return torch.cuda if device == "cuda" else torch.random


class Positions(Protocol):
    """Gives a position module for a head_dim. What is a parameter here, YAML cannot set below `model.positions`."""

    def __call__(self, head_dim: int, *, scale_base: float = ...) -> nn.Module: ...


class LanguageModel(L.LightningModule):
    """A `Transformer` with AdamW and a learning rate that rises linearly, then falls.

    A loss or a weight that is not finite ends the training, and no checkpoint is written any more.

    Args:
        context_length: training length L; the data's own.
        positions: the position module's class, or anything that gives one for a head_dim: `XPOS`, `RotaryEmbedding`;
            or a list with one for each layer.
        scale_base: of position modules that have one; by default half the context length, where the authors' 512 for
            1024 puts it.
        embed_dim, num_layers, num_heads, num_kv_heads, hidden_dim, dropout: see `Transformer`.
        block_size: of blockwise attention, or null for dense; or a list with one for each layer.
        learning_rate: at the end of the warm-up.
        warmup_steps: steps over which the learning rate rises to it.
        schedule: what it does from then on: falls to a tenth as a cosine, falls there linearly, stays constant, or
            (wsd: warm-up, stable, decay) stays until the last fifth of all steps, and falls linearly over these.
        weight_decay: on matrices; none on norms.
        compile: whether each layer is compiled (a graph a layer, which works under every strategy).
        checkpoint_activations: keep a layer's input alone for the backward pass, and compute the rest again.
        vocab_size: how many tokens there are; the data's own.

    Raises:
        UserError: a size or rate is out of range, or scale_base is given within `positions`, or where it
            has no place.
    """

    def __init__(
        self,
        context_length: int,
        positions: tuple[Positions, ...] | Positions = XPOS,  # type: ignore[assignment]  # takes what it has of those
        scale_base: float | None = None,
        embed_dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        block_size: int | list[int | None] | None = None,
        dropout: float = 0.0,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        compile: bool = False,
        schedule: Schedule = "cosine",
        checkpoint_activations: bool = False,
        vocab_size: int = VOCAB_SIZE,
    ):
        super().__init__()
        if not learning_rate > 0:
            raise UserError(f"model.learning_rate must be above 0, got {learning_rate}")
        if warmup_steps < 1:
            raise UserError(f"model.warmup_steps must be 1 or above, got {warmup_steps}")
        if not weight_decay >= 0:
            raise UserError(f"model.weight_decay must be 0 or above, got {weight_decay}")
        many = isinstance(positions, (list, tuple))
        makers = positions if many else [positions]
        if any("scale_base" in getattr(make, "keywords", {}) for make in makers):
            raise UserError("model.positions takes no scale_base; give it as model.scale_base")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.compile_layers = compile
        self.schedule = schedule
        self._first_not_finite: Tensor | None = None
        self._random_state: dict[str, Tensor] | None = None

        def for_context_length(make: Positions, head_dim: int) -> PositionModule:
            try:
                made = make(head_dim)
            except TypeError as error:
                raise UserError(f"model.positions cannot be made with a head_dim: {error}") from error
            if not isinstance(made, PositionModule):
                raise UserError(
                    f"model.positions must give an xpos_zoo.PositionModule, got {type(made).__name__}; "
                    f"right are {', '.join(known.__name__ for known in POSITIONS)}, or a class of your own"
                )
            module: Any = made
            if hasattr(module, "scale_base"):
                module.scale_base = context_length / 2 if scale_base is None else scale_base
                self.hparams["scale_base"] = module.scale_base
            return module

        each = [partial(for_context_length, make) for make in makers]
        try:
            self.transformer = Transformer(
                vocab_size,
                embed_dim,
                num_layers,
                num_heads,
                num_kv_heads=num_kv_heads,
                positions=each if many else each[0],
                block_size=block_size,
                hidden_dim=hidden_dim,
                dropout=dropout,
            )
        except UserError:
            raise
        except ValueError as error:
            # head_dim is no option here.
            message = re.sub(r"^head_dim\b", "embed_dim / num_heads", str(error)).removesuffix("; or give head_dim")
            raise UserError(f"model.{message}") from error
        modules = [attention.positions for attention in self.transformer.attentions]
        if scale_base is not None and not any(hasattr(module, "scale_base") for module in modules):
            raise UserError(f"model.scale_base is {scale_base:g}, but {type(modules[0]).__name__} has no scale_base")
        self.transformer.checkpoint_activations = checkpoint_activations

    def configure_model(self) -> None:
        if self.compile_layers:
            # All layers are one function to the compiler, and each kind of layer has graphs of its own.
            limit = GRAPHS * len(self.transformer.layers)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        for layer in self.transformer.layers:
            if self.compile_layers and layer._compiled_call_impl is None:
                layer.compile(fullgraph=True)
        if self.device_mesh is not None:  # of Lightning's ModelParallelStrategy
            for module in (*self.transformer.layers, self.transformer):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self.transformer(tokens, document_ids=document_ids)

    def predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (b n, vocabulary) and targets (b n,)."""
        inputs, targets, *document_ids = (batch[:, :-1], batch[:, 1:]) if isinstance(batch, Tensor) else batch
        logits = self(inputs, *document_ids).flatten(0, 1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the targets, in nats."""
        return cross_entropy(*self.predictions(batch), ignore_index=IGNORED)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self._note(loss)
        self.log("train_bits_per_byte", self._bits_per_byte("train", loss.detach()), prog_bar=True)
        self.log("train_nats_per_token", loss.detach())
        return loss

    def _note(self, loss: Tensor) -> None:
        """Remember the first step whose loss is not finite, without waiting for the device."""
        if self._first_not_finite is None:
            self._first_not_finite = torch.zeros((), dtype=torch.int64, device=loss.device)
        now = (~loss.detach().isfinite()) * (self.global_step + 1)
        self._first_not_finite = torch.where(self._first_not_finite > 0, self._first_not_finite, now)

    def _check_finite(self) -> None:
        if self._first_not_finite is not None and (step := int(self._first_not_finite)):
            raise UserError(f"the loss of step {step} is not finite; {DIVERGED}")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check_finite()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._random_state is not None:  # of a checkpoint; only now nobody draws any more before dropout does
            for device, state in self._random_state.items():
                random_numbers(device).set_rng_state(state)
            self._random_state = None

    def on_validation_start(self) -> None:
        self._check_finite()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        for name, weight in checkpoint["state_dict"].items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise UserError(f"{name} is not finite after step {checkpoint['global_step']}; {DIVERGED}")
        devices = {"cpu", self.device.type}
        checkpoint["random_state"] = {device: random_numbers(device).get_rng_state() for device in devices}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_held_out("val", batch, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_held_out("test", batch)

    def _log_held_out(self, split: str, batch: Batch, prog_bar: bool = False) -> None:
        logits, targets = self.predictions(batch)
        loss = cross_entropy(logits, targets, ignore_index=IGNORED)
        right = (logits.argmax(-1) == targets)[targets != IGNORED].float().mean()
        measures = {f"{split}_bits_per_byte": self._bits_per_byte(split, loss), f"{split}_accuracy": right}
        self.log_dict(measures, prog_bar=prog_bar, sync_dist=True)
        self.log(f"{split}_nats_per_token", loss, sync_dist=True)

    def _bits_per_byte(self, split: str, loss: Tensor) -> Tensor:
        """Of a loss in nats a token; data that does not say how many tokens a byte has has one."""
        tokens_per_byte = getattr(getattr(self.trainer, "datamodule", None), "tokens_per_byte", None)
        return loss / math.log(2) * (1.0 if tokens_per_byte is None else tokens_per_byte(split))

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # A fused optimizer unscales float16 gradients in its step, after they are clipped; others have it done before.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=fused)
        warmup = LinearLR(optimizer, start_factor=1 / (self.warmup_steps + 1), total_iters=self.warmup_steps)
        steps = int(self.trainer.estimated_stepping_batches)
        parts = [warmup, *self._after_warmup(optimizer, steps)]
        starts = [self.warmup_steps, max(self.warmup_steps, steps - self._decay_steps(steps))]
        schedule = SequentialLR(optimizer, parts, milestones=starts[: len(parts) - 1])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _after_warmup(self, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        falling = max(1, steps - self.warmup_steps)
        match self.schedule:
            case "cosine":
                return [CosineAnnealingLR(optimizer, T_max=falling, eta_min=self.learning_rate / FALL)]
            case "linear":
                return [LinearLR(optimizer, 1.0, 1 / FALL, total_iters=falling)]
            case "constant":
                return [ConstantLR(optimizer, 1.0)]
            case _:
                decay = self._decay_steps(steps)
                return [ConstantLR(optimizer, 1.0), LinearLR(optimizer, 1.0, 1 / FALL, total_iters=decay)]

    def _decay_steps(self, steps: int) -> int:
        return max(1, min(round(steps * DECAY), steps - self.warmup_steps))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own refuses a fused optimizer under mixed precision.
        if gradient_clip_val:
            by_value = gradient_clip_algorithm == "value"
            clip = nn.utils.clip_grad_value_ if by_value else nn.utils.clip_grad_norm_
            clip(self.parameters(), gradient_clip_val)
