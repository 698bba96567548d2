"""`Transformer` for transformers: `import xpos_zoo.hf` registers it with AutoConfig and AutoModelForCausalLM.

Axes: b batch, n sequence.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast

from xpos_zoo.pretrained import HEADER, TransformerConfig
from xpos_zoo.transformer import Transformer
from xpos_zoo.xpos import XPOS

NAMES = [field.name for field in dataclasses.fields(TransformerConfig)]


class XposConfig(PreTrainedConfig):
    """The values of a `TransformerConfig`, under its names and transformers' own (hidden_size for embed_dim, ...).

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
        own = {name: values.pop(name) for name in NAMES if name in values}
        super().__init__(**values)
        vars(self).update(own)

    def validate(self) -> None:
        """The model does; transformers would have num_heads * head_dim be embed_dim."""


class XposCache(Cache):
    """A `KeyValueCache` that counts columns of the batch, padding too, as transformers does."""

    is_compileable = False

    def __init__(self, transformer: Transformer, batch_size: int):
        super().__init__(layers=[])
        self.kv, self.columns = transformer.make_cache(batch_size), 0

    @property
    def is_croppable(self) -> bool:
        return all(layer.block_size is None for layer in self.kv.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns; ValueError if a layer is blockwise."""
        if tokens_to_remove:
            self.kv.crop((self.kv.length + tokens_to_remove).clamp(min=0))
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kv = self.kv.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.kv.length), device=self.kv.length.device).repeat_interleave(repeats))

    def reset(self) -> None:
        self.kv.reset()
        self.columns = 0


class XposForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer`, as `transformer`, that transformers can load, generate from, train and save.

    Folders are those of `Transformer.save_pretrained`. ValueError as from `Transformer.from_config`.
    """

    config_class = XposConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: XposConfig):
        super().__init__(config)
        values = {name: getattr(config, name) for name in NAMES if hasattr(config, name)}
        self.transformer = Transformer.from_config(TransformerConfig(**values))
        vars(config).update(vars(self.transformer.config))
        if self.device.type != "meta":
            for parameter in self.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XPOS):
            module.to(module.scale.device)  # which makes its tables anew

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = self.transformer.checkpoint_activations = enable

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, mode: Any, b: int, n: int) -> None:
        if generation_config.use_cache and model_kwargs.get("cache") is None and not generation_config.cache_implementation:
            b *= max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["cache"] = XposCache(self.transformer, b)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, b, n)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.transformer.head = new_embeddings  # type: ignore[assignment]

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers', with the settings that the transformer has now."""
        vars(self.config).update(vars(self.transformer.config))
        super().save_pretrained(save_directory, *args, **options)

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
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (b, n, vocab_size), or of the last `logits_to_keep` tokens, or of those at these places.

        Args:
            input_ids: (b, n), or else inputs_embeds, (b, n, embed_dim).
            attention_mask: 0 for padding, anywhere in a row, (b, tokens in the cache + n).
            cache: what came before, of an earlier output. Made, and given back, only if use_cache is true.
            labels: (b, n), -100 for none; the loss is that of each token by those before it.
            others: of the loss, such as num_items_in_batch; position_ids change nothing.

        ValueError if one of these has another shape, or input_ids are not below vocab_size.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        transformer = self.transformer
        try:
            x = transformer.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        except IndexError as error:
            limit = f"from 0 to vocab_size - 1 = {self.config.vocab_size - 1}"
            raise ValueError(f"input_ids must be {limit}, got up to {input_ids.max()}: another tokenizer's?") from error
        if cache is None and use_cache:
            cache = XposCache(transformer, len(x))
        if cache is not None and not isinstance(cache, XposCache):
            raise ValueError(f"cache must be one of an earlier output, got {type(cache).__name__}")
        mask, columns = None, x.shape[1] + (0 if cache is None else cache.columns)
        if attention_mask is not None:
            if attention_mask.shape != (len(x), columns):
                raise ValueError(f"attention_mask must have shape {(len(x), columns)}, got {tuple(attention_mask.shape)}")
            mask = attention_mask[:, -x.shape[1] :] == 0
            mask = mask if mask.any() else None
        states = [] if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states) else None
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = transformer._features(x, None if cache is None else cache.kv, None, None, mask, states=states)
            logits = transformer.head(x[:, keep])
        if cache is not None:
            cache.kv.advance()
            cache.columns = columns
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states and (*states, x), cache=cache)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


AutoConfig.register(XposConfig.model_type, XposConfig)
AutoModelForCausalLM.register(XposConfig, XposForCausalLM)
AutoTokenizer.register(XposConfig, fast_tokenizer_class=PreTrainedTokenizerFast)
parts = WeightRenaming(r"^(embedding|layers|norm|head)\.", r"transformer.\1.")
register_checkpoint_conversion_mapping(XposConfig.model_type, [parts])
