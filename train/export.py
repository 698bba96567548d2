"""`python -m train.export --checkpoint runs/xpos/seed1 --output mine/`: a model for `Transformer.from_pretrained`."""

from pathlib import Path

from train.checkpoint import find_checkpoint, load_checkpoint, tokenizer_json_in, write_trained
from train.errors import UserError, command
from train.files import replacing
from train.language_model import LanguageModel
from train.tokens import FILE


def export(checkpoint: str, output: str, block_size: int | None = None, overwrite: bool = False) -> None:
    """Write a trained model and its tokenizer, without optimizer, data or code.

    Args:
        checkpoint: a checkpoint of `python -m train fit`, or the folder of a run, whose last one is meant.
        output: the folder for config.json, model.safetensors, tokenizer.json and training.json.
        block_size: of blockwise attention; by default the trained model's. 0 attends to the whole text.
        overwrite: replace a model that is there.

    Raises:
        UserError: the checkpoint is missing or damaged, its position module is not the library's, a model is there
            already, or safetensors is not installed.
    """
    path = find_checkpoint(checkpoint)
    content = load_checkpoint(path)
    trained = content["state_dict"]["transformer.embedding.weight"].dtype
    tokens, tokenizer = Path(output) / FILE, tokenizer_json_in(content)
    if tokens.exists() and not overwrite:
        raise UserError(f"{tokens} exists; give another path, or --overwrite true")
    model = LanguageModel.load_from_checkpoint(path, map_location="cpu", weights_only=True).transformer.to(trained)
    try:
        if block_size is not None:
            model.set_attention(block_size=block_size or None, window_size=None)
        model.save_pretrained(output, overwrite=overwrite)
    except ValueError as error:
        raise UserError(str(error).replace("overwrite=True", "--overwrite true")) from error
    tokens.unlink(missing_ok=True)  # of a model that was there
    if tokenizer is not None:
        with replacing(tokens) as draft:
            draft.write_text(tokenizer, encoding="utf-8")
    content["hyper_parameters"] |= {"block_size": model.block_size, "window_size": model.window_size}
    write_trained(Path(output), content)
    print(f"{output}: a {trained} model of {sum(p.numel() for p in model.parameters()):,} weights from {path}")


if __name__ == "__main__":
    command(export)
