"""`Transformer` for transformers: `import xpos_zoo.hf` registers it with AutoConfig and AutoModelForCausalLM.

Axes: b batch, n sequence.
"""

import dataclasses
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from xpos_zoo.generation import check_tokens
from xpos_zoo.pretrained import HEADER, TransformerConfig
from xpos_zoo.rotary import XPOS
from xpos_zoo.transformer import Transformer

LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
NAMES = {field.name for field in dataclasses.fields(TransformerConfig)}


class XposConfig(PreTrainedConfig):
    """The values of a `TransformerConfig`, under its names and transformers' (hidden_size for embed_dim, ...).

    ValueError if they are of another model type or version; what else is wrong the model says.
    """

    model_type = HEADER["model_type"]
    attribute_map = {  # noqa: RUF012 (as transformers declares it)
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "hidden_dim",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **values: Any):
        for key, expected in HEADER.items():
            if values.setdefault(key, expected) != expected:
                raise ValueError(f"config must have {key} {expected!r}, got {values[key]!r}")
        super().__init__(**{key: value for key, value in values.items() if key not in NAMES})
        vars(self).update({key: value for key, value in values.items() if key in NAMES})

    def validate(self) -> None:
        """The model does; transformers would have num_heads * head_dim be embed_dim."""


class XposLayer(CacheLayerMixin):
    """What transformers may ask of one layer of an `XposCache`, whose layers change only together."""

    def __init__(self, cache: "XposCache", is_local: bool):
        self.cache, self.is_sliding, self.is_croppable = cache, is_local, not is_local

    is_initialized = property(lambda self: self.cache.columns > 0)  # type: ignore[assignment]

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("an XposCache is filled by the model alone, and changed as a whole, not by layer")

    lazy_initialization = update = offload = prefetch = reset = reorder_cache = crop = refuse  # type: ignore[assignment]
    batch_repeat_interleave = batch_select_indices = refuse


class XposCache(Cache):
    """A `KeyValueCache`, `kv`, that also counts columns of the batch, padding too, as transformers does.

    While it is empty it fits any batch; the model's next forward makes `kv` anew.
    """

    def __init__(self, model: Any):
        super().__init__(layers=[])
        while not isinstance(model, Transformer):
            model = model.model  # of an XposForCausalLM, perhaps with adapters
        self.start(model, 0, torch.device("cpu"))

    def start(self, model: Transformer, batch_size: int, device: torch.device) -> None:
        self.kv, self.columns = model.make_cache(batch_size, device=device), 0
        self.attention_mask: Tensor | None = None  # of these columns; None if all count
        self.layers = [XposLayer(self, layer.layout.num_slots > 0) for layer in self.kv]

    @property
    def batch_size(self) -> int:
        return len(self.kv.length) if self.columns else -1

    def extend(self, n: int, attention_mask: Tensor | None) -> None:
        """Count n more columns, which the model has written; the mask is of all, None if the new ones count."""
        self.kv.advance()
        self.columns += n
        if attention_mask is not None:
            self.attention_mask = attention_mask != 0
        elif self.attention_mask is not None:
            self.attention_mask = pad(self.attention_mask, (0, n), value=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns; ValueError if that is above 0, or a layer is blockwise."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or below, got {tokens_to_remove}")
        columns = max(0, self.columns + tokens_to_remove)
        if columns < self.columns:
            mask = self.attention_mask
            self.kv.crop(self.kv.length - (self.columns - columns if mask is None else mask[:, columns:].sum(dim=1)))
            self.columns, self.attention_mask = columns, None if mask is None else mask[:, :columns]

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.columns:
            rows = torch.as_tensor(indices, device=self.kv.length.device)
            self.kv = self.kv.select(rows)
            self.attention_mask = None if self.attention_mask is None else self.attention_mask[rows]

    reorder_cache = batch_select_indices  # type: ignore[assignment]
    prefetch = offload = XposLayer.refuse  # type: ignore[assignment]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.kv.length)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.kv.reset()
        self.columns, self.attention_mask = 0, None


def rename_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights load: names of a `Transformer`, as in its files, become those that `module` has for them."""
    for name in list(state_dict):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest.partition(".")[0] in dict(module.model.named_children()):  # type: ignore[operator, union-attr]
            state_dict[f"{prefix}model.{rest}"] = state_dict.pop(name)


def check_others(others: dict[str, Any], past: int, n: int) -> None:
    """Raise TypeError for an unknown argument of `forward`, ValueError for one that ought to have an effect."""
    for name, value in others.items():
        if name not in (*LOSS_ARGUMENTS, "cache_position", "output_attentions", "token_type_ids"):
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        if name in LOSS_ARGUMENTS or value is None:
            continue
        given = torch.as_tensor(value)
        if name == "cache_position" and given.tolist() != list(range(past, past + n)):
            raise ValueError(f"cache_position must count the new tokens, from {past} to {past + n - 1}, got others")
        if name in ("output_attentions", "token_type_ids") and given.any():
            raise ValueError(f"{name} must be 0 or None: the model has no attention weights to give, nor token types")


def find_padding(attention_mask: Tensor, b: int, n: int, cache: XposCache | None, each_row: bool) -> Tensor | None:
    """Which of the new tokens are padding, (b, n); None if all count.

    ValueError if the mask has another shape, other values, not the tokens that are in the cache, or, with `each_row`,
    no new token of a row in it.
    """
    past = 0 if cache is None else cache.columns
    if attention_mask.shape != (b, past + n):
        raise ValueError(f"attention_mask must be {(b, past + n)}, got {tuple(attention_mask.shape)}")
    counts = attention_mask != 0
    if not (attention_mask == counts).all():
        raise ValueError("attention_mask must be 1 for tokens and 0 for padding, got other values")
    padding = ~counts[:, past:]
    if cache is not None and past:
        needed, found = cache.kv.length, counts[:, :past].sum(dim=1)
        if (needed != found).any():
            allowed = f"a 1 for each token in the cache, {needed.tolist()} in all"
            raise ValueError(f"attention_mask must have {allowed}, got {found.tolist()}")
        if each_row and (padding.all(dim=1) & (needed > 0)).any():
            allowed = "a 1 in each row of a prompt, and of its last prefill_chunk_size"
            raise ValueError(f"attention_mask must have {allowed}, got a row with padding alone")
    return padding if padding.any() else None


def packed_documents(position_ids: Tensor, b: int, n: int, padding: Tensor | None) -> Tensor | None:
    """Of which document each token is, (b, n), if a row's positions restart; None if they only count up.

    Padding does not count. ValueError if positions have another shape, or do anything else.
    """
    if position_ids.shape not in ((n,), (1, n), (b, n)):
        raise ValueError(f"position_ids must be {(b, n)}, got {tuple(position_ids.shape)}")
    positions = position_ids.expand(b, n)
    order = torch.arange(n, device=positions.device).expand(b, n)
    if padding is not None:
        order = padding.int().argsort(dim=1, stable=True)
        positions = positions.gather(1, order)
    later, restarts = positions[:, 1:], positions.diff(dim=1) != 1
    if padding is not None:
        restarts &= ~padding.gather(1, order)[:, 1:]
    if (restarts & (later != 0) & (later != positions[:, :1])).any():
        raise ValueError("position_ids must count up by 1, and restart only at 0 or at the row's first")
    if not restarts.any():
        return None
    documents = pad(restarts.cumsum(dim=1), (1, 0))
    return documents.scatter(1, order, documents)


class XposForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer`, `model`, that transformers loads, generates from, trains and saves, in the same folders.

    Errors are those of `Transformer.from_config`.
    """

    config_class = XposConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: XposConfig):
        super().__init__(config)
        settings = TransformerConfig(**{key: value for key, value in vars(config).items() if key in NAMES})
        self.model = Transformer.from_config(settings)
        # Under accelerate's `init_empty_weights`, weights are tied later.
        vars(config).update(vars(self.model.config), tie_embeddings=settings.tie_embeddings)
        if self.device.type != "meta":
            for parameter in self.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_load_state_dict_pre_hook(rename_weights)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XPOS):
            module.reset_constants(module.scale.device)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = self.model.checkpoint_activations = enable

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *others: Any) -> Any:  # type: ignore[override]
        kind, given = generation_config.cache_implementation, model_kwargs.get("cache")
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be None or 'dynamic', which make an XposCache, got {kind!r}")
        if not generation_config.use_cache and given is not None:
            raise ValueError("use_cache must be True with a cache")
        if others[0] == GenerationMode.ASSISTED_GENERATION and given is not None and given.get_seq_length():
            raise ValueError("cache must be empty with prompt lookup or an assistant, which start with all tokens")
        if generation_config.use_cache and given is None:
            model_kwargs["cache"] = XposCache(self.model)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)  # type: ignore[misc]

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: Any) -> None:
        """None: `forward` needs none."""

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: XposCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', with `padding_first`, for `generate` takes the logits that are last in a row."""
        if cache is not None and next_sequence_length is not None and next_sequence_length < 1:
            known = f"the {cache.get_seq_length()} columns in the cache"
            raise ValueError(f"input_ids must be all tokens, {known} and new ones, got {input_ids.shape[1]}")
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        inputs["padding_first"] = True
        if not kwargs.get("is_first_iteration"):
            inputs.pop("position_ids", None)  # transformers counted on from the last column, be it padding
        return inputs

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, by the names in files or the model's own; a tied head may be missing, as it is in files."""
        state_dict = copy(state_dict)
        for prefix in ("", "model."):
            if strict and self.config.tie_embeddings and f"{prefix}embedding.weight" in state_dict:
                state_dict.setdefault(f"{prefix}head.weight", state_dict[f"{prefix}embedding.weight"])  # type: ignore[attr-defined]
        result = super().load_state_dict(state_dict, strict, assign)
        self.tie_weights()  # which `assign` unties
        return result

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers', with the settings that `model` has now."""
        vars(self.config).update(vars(self.model.config))
        super().save_pretrained(save_directory, *args, **options)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: XposCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        past_key_values: XposCache | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        padding_first: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (b, n, vocab_size), or only of the last `logits_to_keep` columns, or of those at these places.

        Args:
            input_ids: (b, n), or else inputs_embeds, (b, n, embed_dim).
            attention_mask: 1, or 0 for padding, anywhere in a row, (b, columns in the cache + n).
            cache: what came before, of an earlier output, or an empty `XposCache(model)`. It has no gradient, and is
                made only if use_cache is true.
            labels: (b, n), -100 for none; the loss is that of each token by those before it.
            past_key_values: what transformers called the cache before.
            position_ids: (b, n). Where they restart in a row, a document begins; only relative positions matter.
            document_ids: (b, n), of packed documents, which do not attend to each other; without a cache.
            padding_first: whether logits are in an order in which each row's padding comes first, as `generate` needs.
            others: of the loss, num_items_in_batch, shift_labels and ignore_index; or, without effect,
                cache_position, token_type_ids of 0 and output_attentions=False, which transformers passes.

        ValueError if one of these has another shape, two are given that are one, or input_ids are not below vocab_size;
        TypeError if an argument has another name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, not both")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one")
        model, x = self.model, inputs_embeds
        cache = past_key_values if cache is None else cache
        if x is None:
            assert input_ids is not None
            check_tokens(input_ids)
            try:
                x = model.embedding(input_ids)
            except IndexError as error:
                ids = f"from 0 to {self.config.vocab_size - 1}, got {input_ids.min()} to {input_ids.max()}"
                raise ValueError(f"input_ids must be {ids}: of another tokenizer?") from error
        b, n, _ = x.shape
        if cache is None and use_cache:
            cache = XposCache(model)
        if cache is not None and not isinstance(cache, XposCache):
            raise ValueError(f"cache must be that of an earlier output, got {type(cache).__name__}")
        if cache is not None and cache.columns and cache.kv.length.device != x.device:
            raise ValueError(f"cache must be on the device of the tokens, {x.device}, got {cache.kv.length.device}")
        past = 0 if cache is None else cache.columns
        check_others(others, past, n)
        padding = None if attention_mask is None else find_padding(attention_mask, b, n, cache, padding_first)
        if position_ids is not None and n > 1:
            restarts = packed_documents(position_ids, b, n, padding)
            if restarts is not None and (cache is not None or document_ids is not None):
                raise ValueError("position_ids must not restart within a row with a cache or document_ids")
            document_ids = document_ids if restarts is None else restarts
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if cache is not None and past == 0:
            cache.start(model, b, x.device)  # x's, for offloaded weights are on meta
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            kv = None if cache is None else cache.kv
            states = model.hidden_states(x, kv, document_ids=document_ids, key_padding_mask=padding)
            last = states[-1]
            if padding_first and padding is not None:
                last = last.gather(1, (~padding).int().argsort(dim=1, stable=True)[..., None].expand_as(last))
            logits = model.head(last[:, keep])
        if cache is not None:
            cache.extend(n, attention_mask)
        loss = None
        if labels is not None or others.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss, logits, cache, tuple(states) if hidden else None)  # type: ignore[arg-type]


AutoConfig.register(XposConfig.model_type, XposConfig)
AutoModelForCausalLM.register(XposConfig, XposForCausalLM)
AutoTokenizer.register(XposConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
renaming = WeightRenaming(r"^(embedding|layers|norm|head)\.", r"model.\1.")
register_checkpoint_conversion_mapping(XposConfig.model_type, [renaming])
