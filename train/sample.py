"""`python -m train.sample --checkpoint runs/xpos/seed1 --prompt "def "`: text from a trained model, as it comes."""

from itertools import chain, islice

import torch

from train.checkpoint import find_trained, load_trained, tokenizer_json_in
from train.errors import UserError, command
from train.runs import load_model
from train.tokens import byte_tokenizer, decode, tokenizer_from


def sample(
    checkpoint: str,
    prompt: str = "\n",
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    block_size: int | None = None,
    compile: bool = False,
    device: str = "cpu",
) -> None:
    """Print the prompt and what the model makes of it, as soon as it makes it.

    Args:
        checkpoint: a checkpoint of `python -m train fit`, the folder of a run, whose last one is meant, or that of an
            exported model.
        prompt: how the text begins; at least one character.
        max_new_tokens: tokens to draw. Any number: blockwise attention takes the same time and memory for each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens whose probabilities sum to p.
        seed: of the random numbers; the same seed gives the same text.
        block_size: of blockwise attention; by default the trained model's, and half the trained length for layers that
            have none and nothing else, such as a window or a distance bias. 0 attends to the whole text.
        compile: compile the step; worth it for long texts.
        device: cpu or cuda.

    Raises:
        UserError: an argument is out of range, or the checkpoint is missing or damaged.
    """
    path = find_trained(checkpoint)
    trained = load_trained(path)
    content, half = tokenizer_json_in(trained), trained["hyper_parameters"]["context_length"] // 2
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device must be cpu{', or cuda' * torch.cuda.is_available()}, got {device}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt must be valid UTF-8, got {prompt!r}") from error
    tokenizer = byte_tokenizer() if content is None else tokenizer_from(content)
    begin = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not begin:
        raise UserError(f"prompt must have at least one token, got {prompt!r}")
    model = load_model(path, device)
    try:
        names = "window_size", "query_scaling", "distance_bias"
        softened = [any(getattr(each, name) is not None for name in names) for each in model.attentions]
        far = [None if soft else half for soft in softened]
        default = [each.block_size or own for each, own in zip(model.attentions, far, strict=True)]
        if block_size is None:
            model.block_size = default
        else:
            model.set_attention(block_size=block_size or None, window_size=None)
        stream = model.stream(
            torch.tensor([begin], device=device),
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            decode=torch.compile(model, fullgraph=True) if compile else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    print(prompt, end="", flush=True)
    try:
        for text in islice(decode(tokenizer, chain(begin, map(int, stream))), len(begin), None):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # enough text
    print()


if __name__ == "__main__":
    command(sample)
