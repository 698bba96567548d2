"""A Mistral of transformers with a sliding window, carried over into our `Transformer`: the same logits.

Its state dict goes over name by name. Then it generates from a ring buffer, whose size does not grow.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM  # type: ignore[import-not-found]

from xpos_zoo import RotaryEmbedding, Transformer

WINDOW, THETA = 16, 10_000.0
NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "layers",
    "model.norm": "norm",
    "lm_head": "head",
    "self_attn": "attention",
    "o_proj": "out_proj",
    "mlp": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in state_dict.items():
        for theirs, ours in NAMES.items():
            name = f".{name}.".replace(f".{theirs}.", f".{ours}.").strip(".")
        renamed[name] = weight
    return renamed


def main() -> dict[str, float]:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        rms_norm_eps=torch.finfo(torch.float32).eps,  # ours
        initializer_range=0.2,  # so that attention matters
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    mistral = MistralForCausalLM(config).eval()
    ours = Transformer(
        256,
        64,
        2,
        4,
        num_kv_heads=2,
        hidden_dim=128,
        window_size=WINDOW,
        tie_embeddings=False,
        positions=partial(RotaryEmbedding, base=THETA, interleaved=False),  # Llama's pairs: half a head apart
    ).eval()
    ours.load_state_dict(renamed(mistral.state_dict()))
    tokens, cache = torch.randint(256, (2, 200)), ours.make_cache(2)
    with torch.no_grad():
        expected, dense = mistral(tokens).logits, mistral(tokens[:, :WINDOW]).logits
        logits = ours(tokens)
        decoded = torch.cat([ours(token, cache) for token in tokens.split([150] + [1] * 50, dim=1)], dim=1)
        ours.window_size = None
        without = ours(tokens)
    norm = expected.norm().item()
    return {
        "error of the logits": (logits - expected).norm().item() / norm,
        "error from a cache": (decoded - expected).norm().item() / norm,
        "error within one window": (logits[:, :WINDOW] - dense).norm().item() / dense.norm().item(),
        "difference without a window": (without - expected).norm().item() / norm,
        "slots of the cache": cache[0].num_slots,
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:28} {value:.3g}")
