"""Softmax attention by torch's kernels: causal, with a mask, and with a gain on scores.

Axes: b batch, n queries, m keys, h heads, d head dimension.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, scaled_dot_product_attention

from xpos_zoo.rotation import at_least_float32
from xpos_zoo.settings import AttentionSettings, BatchLayout
from xpos_zoo.visibility import LogitTerms

# Not cuDNN, which takes a hidden score for -65504: xPos gives less far in the future (pytorch #177842).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, terms: LogitTerms | None, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention of q (b, h, n, d) on k, v (b, h, m, d): (b, h, n, d).

    Without terms it is causal, and the last query sees the last key; k and v may then have fewer heads on CUDA, but for
    float32. See `can_skip_mask`.
    """
    cuda = q.device.type == "cuda"
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the mask
        if terms is None and q.shape[2] != k.shape[2]:
            if not cuda:
                return CausalAfterPast.apply(q, k, v)[0]  # type: ignore[index]
            # Private, for torch's public name of this kernel, causal_lower_right, cannot be used inside a graph.
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True)[0]
        if terms is not None and terms.gain is not None:  # no fused kernel multiplies scores
            dtype = at_least_float32(q.dtype)
            scores = q.to(dtype) @ k.to(dtype).mT
            weights = torch.addcmul(terms.bias, scores, terms.gain, value=q.shape[-1] ** -0.5).softmax(-1)
            return dropout(weights.to(v.dtype), dropout_p) @ v
        mask = None if terms is None else terms.bias.to(q.dtype) if cuda else terms.bias
        with sdpa_kernel(BACKENDS) if cuda else nullcontext():
            grouped = bool(k.shape[1] != q.shape[1])
            return scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout_p, is_causal=mask is None, enable_gqa=grouped
            )


class CausalAfterPast(torch.autograd.Function):
    """Causal attention of q (b, h, n, d) on the last n of k, v (b, h, m, d), and of all queries on those before them.

    The CPU's kernel is slower with a mask. So both parts are attended to without one, and joined by their log-sum-exps;
    backward, each part is handed the joined output and log-sum-exp, as in ring attention (Liu et al. 2023).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past = k.shape[2] - q.shape[2]
        # Private: the public function does not give the log-sum-exp.
        attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own, own_lse = attend(q, k[:, :, past:], v[:, :, past:], 0.0, True)
        before, before_lse = attend(q, k[:, :, :past], v[:, :, :past], 0.0, False)
        lse = torch.logaddexp(own_lse, before_lse)
        share = torch.exp(own_lse - lse)[..., None]
        return torch.lerp(before.to(share.dtype), own.to(share.dtype), share).to(q.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        past, parts = k.shape[2] - q.shape[2], []
        for part, is_causal in ((slice(None, past), False), (slice(past, None), True)):
            backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            parts.append(backward(gradient, q, k[:, :, part], v[:, :, part], out, lse, 0.0, is_causal))
        (q_before, k_before, v_before), (q_own, k_own, v_own) = parts
        return q_before + q_own, torch.cat((k_before, k_own), 2), torch.cat((v_before, v_own), 2)


def can_skip_mask(settings: AttentionSettings, layout: BatchLayout) -> bool:
    """Whether `softmax_attention` attends causally with more keys than queries without a mask.

    On a CPU, where that is faster, in sequences (not in blocks). On CUDA by flash attention: for the head dimensions
    that every GPU from compute capability 8 on can differentiate, and batches that fit a grid.
    """
    if not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled():
        return False  # `sdpa_kernel` forbids it, on CPUs too
    if layout.device.type != "cuda":
        return layout.device.type == "cpu" and settings.pattern.row_length is None and settings.dropout_p == 0
    if layout.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = 2 * len(settings.positions.rates)
    length = settings.pattern.row_length
    rows = layout.b * (3 + (0 if length is None else layout.n // length))
    fits = head_dim % 8 == 0 and head_dim <= 192 and rows < 2**16
    return fits and torch.version.hip is None and torch.cuda.get_device_properties(layout.device).major >= 8
