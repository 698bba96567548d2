"""`python -m train.sample --checkpoint runs/xpos/seed1 --prompt "def "`: text from a trained model, as it comes."""

from pathlib import Path

import torch

from train.checkpoint import last_checkpoint_of, load_checkpoint
from train.errors import UserError, command
from train.language_model import LanguageModel
from train.text import tokenizer_json_in
from train.tokens import restored


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
        checkpoint: a checkpoint of `python -m train fit`, or the folder of a run, whose last one is meant.
        prompt: how the text begins; at least one character.
        max_new_tokens: tokens to draw. Any number: blockwise attention takes the same time and memory for each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens whose probabilities sum to p.
        seed: of the random numbers; the same seed gives the same text.
        block_size: of blockwise attention; by default the trained model's, and half the trained length for layers that
            have none. 0 attends to the whole text.
        compile: compile the step; worth it for long texts.
        device: cpu or cuda.

    Raises:
        UserError: an argument is out of range, or the checkpoint is missing or damaged.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = last_checkpoint_of(path)
    content = load_checkpoint(path)
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device must be cpu{', or cuda' * torch.cuda.is_available()}, got {device}")
    if not prompt:
        raise UserError("prompt must have at least one character, got none")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt must be valid UTF-8, got {prompt!r}") from error
    tokenizer = restored(tokenizer_json_in(content))
    begun = tokenizer.encode([prompt])[0].tolist()
    if not begun:
        raise UserError(f"prompt must have at least one token, {prompt!r} has none")
    module = LanguageModel.load_from_checkpoint(path, map_location=device, weights_only=True).eval()
    model = module.transformer
    tokens = torch.tensor([begun], device=device)
    try:
        if block_size is None:
            half = module.hparams["context_length"] // 2
            model.block_size = [attention.block_size or half for attention in model.attentions]
        else:
            model.block_size = block_size or None
        stream = model.stream(
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            decode=torch.compile(model, fullgraph=True) if compile else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    decoder = tokenizer.decoder()
    for token in begun:
        decoder.add(token)
    print(prompt, end="", flush=True)
    try:
        for token in stream:
            print(decoder.add(int(token)), end="", flush=True)
    except KeyboardInterrupt:
        pass  # enough text
    print(decoder.end())


def main(args: list[str] | None = None) -> None:
    command(sample, args)


if __name__ == "__main__":
    main()
