"""Drawing the next token from logits.

Axes: b batch, c vocabulary.
"""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Tokens (b,) drawn from logits (b, c).

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens (and ties with the last of them).
        top_p: only the fewest likeliest tokens whose probabilities, after top_k, sum to p (Holtzman et al. 2020).
        generator: of the random numbers; by default torch's own.

    ValueError if temperature is negative, top_k below 1, or top_p outside (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        enough = probabilities.cumsum(-1) - probabilities >= top_p  # those before it suffice
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise the ValueErrors of `sample`."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or above, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
