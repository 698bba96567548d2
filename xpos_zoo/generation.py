"""Text from a `Transformer`, token by token: `generate`, `stream`, and `sample` for the next token.

Axes: b batch, n sequence, c vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from xpos_zoo.checks import as_integer, require_integers


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
    if top_k is not None:
        as_integer("top_k", top_k, allowed="1 or above and an integer")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def generate(
    model: Any, tokens: Tensor, max_new_tokens: int, *, lengths: Tensor | None = None, **options: Any
) -> Tensor:
    """Continue each row of tokens (b, n): (b, n + up to max_new_tokens).

    Each row's new tokens follow its own end; with `lengths`, what remains on the right is still padding. All
    arguments are those of `stream`.
    """
    new_tokens = stream(model, tokens, max_new_tokens, lengths=lengths, **options)
    ends = tokens.shape[1] if lengths is None else lengths.long()
    rows = torch.arange(len(tokens), device=tokens.device)
    for count, new in enumerate(new_tokens):
        tokens = pad(tokens, (0, 1))
        tokens[rows, ends + count] = new
    return tokens


def stream(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    seed: int | None = None,
    decode: Callable[..., Tensor] | None = None,
) -> Iterator[Tensor]:
    """Continue each row of tokens (b, n): an iterator over (b,), the rows' next tokens.

    Works at any length from a cache; with `block_size` set, in constant memory and time a token. Call `eval()`
    first if the model has dropout.

    Args:
        tokens: the prompts, at least one token each.
        max_new_tokens: when to stop.
        lengths: tokens of each prompt, (b,), if the prompts are padded on the right; each goes on as if alone.
        temperature, top_k, top_p: how to draw; see `xpos_zoo.generation.sample`. Temperature 0 is greedy.
        eos: the token, or tokens, that end a row, which then repeats its last one; when all rows have ended, so does
            the iterator.
        seed: of the random numbers; by default torch's own go on.
        decode: what to call for a step instead of this model, such as `torch.compile(model, fullgraph=True)`.

    ValueError, at once, if an argument is out of range or has another shape.
    """
    check_tokens(tokens)
    n = tokens.shape[1]
    if n == 0:
        raise ValueError(f"tokens must have at least one token a row, got {tuple(tokens.shape)}")
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 0, "0 or above and an integer")
    vocab_size = model.embedding.num_embeddings
    ends = [] if eos is None else list(eos) if isinstance(eos, Sequence) else [eos]
    for name, values in (("tokens", (tokens.min(), tokens.max()) if tokens.numel() else ()), ("eos", ends)):
        for value in values:
            if not 0 <= as_integer(name, value, 0, f"from 0 to {vocab_size - 1}") < vocab_size:
                raise ValueError(f"{name} must be from 0 to {vocab_size - 1}, got {int(value)}")
    if lengths is not None:
        require_integers("lengths", lengths, tokens.shape[:1])
        if not ((lengths > 0) & (lengths <= n)).all():
            raise ValueError(f"lengths must be from 1 to seq_len={n}, got {lengths.tolist()}")
    check_sampling(temperature, top_k, top_p)
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)

    @torch.no_grad()
    def steps() -> Iterator[Tensor]:  # apart, so that errors are raised before the first step
        x = model.embedding(tokens)
        cache = model.make_cache(len(tokens), n + max_new_tokens, device=x.device)  # weights may be offloaded
        hidden = model.hidden_states(x, cache, lengths=lengths)[-1]
        cache.advance()
        rows = torch.arange(len(tokens), device=tokens.device)
        logits = model.head(hidden[rows, -1 if lengths is None else lengths - 1])
        ended, last = torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=tokens.dtype)
        stop = torch.tensor([int(end) for end in ends], device=tokens.device)
        for left in reversed(range(max_new_tokens)):
            new = sample(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
            if ends:
                new = torch.where(ended, last, new)
                ended |= torch.isin(new, stop)
                last = new
            yield new
            if left == 0 or (ends and ended.all()):
                return
            logits = (model if decode is None else decode)(new[:, None], cache)[:, -1]

    return steps() if max_new_tokens else iter(())


def check_tokens(tokens: Any) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be int64 or int32 (batch, seq_len), got {got}")
