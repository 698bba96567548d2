"""What are the tokens of a text? Its bytes, or those of any `tokenizer.json`; both are a `tokenizers.Tokenizer`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from train.errors import UserError

BYTES = 256
FILE = "tokenizer.json"
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")  # names of the token between documents


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose tokens are the bytes of UTF-8: token i is byte i."""
    # ByteLevel writes a byte as one character: those that print as themselves, the others from 256 on.
    printed = [byte for byte in range(BYTES) if chr(byte) in pre_tokenizers.ByteLevel.alphabet()]
    others = [byte for byte in range(BYTES) if byte not in printed]
    characters = {chr(byte): byte for byte in printed} | {chr(BYTES + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tokenizer(option: str) -> Tokenizer:
    """The tokenizer that data.tokenizer asks for: bytes, or the path of a tokenizer.json.

    Raises:
        UserError: the file cannot be read, or holds no tokenizer.
    """
    if option == "bytes":
        return byte_tokenizer()
    if not option.endswith(".json"):
        raise UserError(f"data.tokenizer must be bytes or the path of a {FILE}, got {option!r}")
    try:
        return tokenizer_from(Path(option).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers has no type of its own for a damaged file
        raise UserError(f"data.tokenizer: {option} cannot be read as a {FILE}: {error}") from error


def tokenizer_from(content: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json with this content, with a token between documents.

    Text that reads like a special token is tokenised as text.
    """
    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not is_bytes(tokenizer):
        if separator(tokenizer) is None:
            tokenizer.add_special_tokens([AddedToken(SEPARATORS[0], special=True)])
        tokenizer.encode_special_tokens = True
    return tokenizer


def is_bytes(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab_size() == BYTES and tokenizer.to_str() == byte_tokenizer().to_str()


def separator(tokenizer: Tokenizer) -> int | None:
    """The token after each document: NUL, which text does not hold, or the first special token that is known as one."""
    if is_bytes(tokenizer):
        return 0
    special = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return next((special[name] for name in SEPARATORS if name in special), None)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One above the largest token."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece, as soon as it is certain."""
    stream = decoders.DecodeStream(skip_special_tokens=False)
    for token in tokens:
        yield stream.step(tokenizer, token) or ""
