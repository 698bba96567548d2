"""`Transformer` for transformers: `import xpos_zoo.hf` registers it with AutoConfig and AutoModelForCausalLM.

Axes: b batch, n sequence.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from xpos_zoo.generation import check_tokens
from xpos_zoo.pretrained import HEADER, TransformerConfig
from xpos_zoo.rotary import XPOS
from xpos_zoo.transformer import Transformer

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


class XposCache(Cache):
    """A `KeyValueCache` that also counts columns of the batch, padding too, as transformers does."""

    def __init__(self, model: Transformer, batch_size: int):
        super().__init__(layers=[])
        self.kv, self.columns = model.make_cache(batch_size), 0

    is_compileable = property(lambda self: False)  # type: ignore[assignment]
    is_croppable = property(lambda self: all(layer.layout.num_slots == 0 for layer in self.kv))  # type: ignore[assignment]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns; ValueError if a layer is blockwise."""
        if tokens_to_remove:
            self.kv.crop((self.kv.length + tokens_to_remove).clamp(min=0))
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kv = self.kv.select(beam_idx)

    def reset(self) -> None:
        self.kv.reset()
        self.columns = 0


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
        self.model = Transformer.from_config(
            TransformerConfig(**{key: value for key, value in vars(config).items() if key in NAMES})
        )
        vars(config).update(vars(self.model.config))
        if self.device.type != "meta":
            for parameter in self.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XPOS):
            module.reset_constants(module.scale.device)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = self.model.checkpoint_activations = enable

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *others: Any) -> Any:  # type: ignore[override]
        if not generation_config.use_cache or "cache" in model_kwargs or generation_config.cache_implementation:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *others)  # type: ignore[misc]
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["cache"] = XposCache(self.model, copies * others[1])
        return None

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
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (b, n, vocab_size), or only of the last `logits_to_keep` tokens, or of those at these places.

        Args:
            input_ids: (b, n), or else inputs_embeds, (b, n, embed_dim).
            attention_mask: 0 for padding, anywhere in a row, (b, tokens in the cache + n).
            cache: what came before, of an earlier output. It has no gradient, and is made only if use_cache is true.
            labels: (b, n), -100 for none; the loss is that of each token by those before it.
            past_key_values: what transformers called the cache before.
            others: of the loss, such as num_items_in_batch. position_ids change nothing.

        ValueError if one of these has another shape, two are given that are one, or input_ids are not below vocab_size.
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
            cache = XposCache(model, b)
        if cache is not None and not isinstance(cache, XposCache):
            raise ValueError(f"cache must be that of an earlier output, got {type(cache).__name__}")
        columns, mask = n if cache is None else n + cache.columns, None
        if attention_mask is not None:
            if attention_mask.shape != (b, columns):
                raise ValueError(f"attention_mask must be {(b, columns)}, got {tuple(attention_mask.shape)}")
            mask = attention_mask[:, columns - n :] == 0
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            mask = mask if mask is not None and mask.any() else None
            kv = None if cache is None else cache.kv
            states = model.hidden_states(x, kv, key_padding_mask=mask)
            logits = model.head(states[-1][:, keep])
        if cache is not None:
            cache.kv.advance()
            cache.columns = columns
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss, logits, cache, tuple(states) if hidden else None)  # type: ignore[arg-type]


AutoConfig.register(XposConfig.model_type, XposConfig)
AutoModelForCausalLM.register(XposConfig, XposForCausalLM)
AutoTokenizer.register(XposConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
renaming = WeightRenaming(r"^(embedding|layers|norm|head)\.", r"model.\1.")
register_checkpoint_conversion_mapping(XposConfig.model_type, [renaming])
