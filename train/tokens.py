"""What the tokens of a text are: its bytes, or pieces of words that were learned or that a file gives."""

import codecs
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.errors import UserError
from train.sources import needed

VOCAB_SIZE = 256  # of bytes
FILE = "tokenizer.json"
SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")  # what others call theirs
LEARNED_FROM = 2**30  # characters of training text at most: memory grows with the number of different words


class Decoder(Protocol):
    """Gives text for tokens as they come."""

    def add(self, token: int) -> str: ...

    def end(self) -> str: ...


class Tokenizer(Protocol):
    """Texts into numbers and back.

    Attributes:
        size: how many tokens there are; their numbers are below it.
        separator: the token after each document, which is made of no text.
        unit: what one is called.
    """

    size: int
    separator: int
    unit: str

    @property
    def state(self) -> dict[str, Any]:
        """What tells it apart from any other, in JSON."""
        ...

    def to_json(self) -> str | None:
        """The content of a tokenizer.json; none for bytes."""
        ...

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text."""
        ...

    def decoder(self) -> Decoder: ...


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    decoder = tokenizer.decoder()
    return "".join(map(decoder.add, tokens)) + decoder.end()


class ByteDecoder:
    """Characters as soon as they are complete."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self.utf8.decode(bytes([token]) if token < VOCAB_SIZE else "�".encode())

    def end(self) -> str:
        return self.utf8.decode(b"", final=True)


class Bytes:
    """Bytes of UTF-8, separated by the NUL, which text does not hold."""

    size = VOCAB_SIZE
    separator = 0
    unit = "byte"

    @property
    def state(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def to_json(self) -> None:
        return None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decoder(self) -> Decoder:
        return ByteDecoder()


class SubwordDecoder:
    """Text as soon as it is certain."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.stream = tokenizers().decoders.DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        return self.stream.step(self.tokenizer, token) or ""

    def end(self) -> str:
        return ""


class Subwords:
    """The tokens of a `tokenizers.Tokenizer`.

    The separator is the first of its special tokens that is known as one, or one that is added. Special tokens are made
    of no text, not even of text that reads like one.
    """

    unit = "token"

    def __init__(self, tokenizer: Any):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = {t.content: number for number, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        known = [name for name in SEPARATORS if name in special]
        if not known:
            tokenizer.add_special_tokens([tokenizers().AddedToken(SEPARATORS[0], special=True)])
        tokenizer.encode_special_tokens = True  # which means: as text
        self.tokenizer = tokenizer
        self.separator = tokenizer.token_to_id((known or SEPARATORS)[0])
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_json(cls, content: str, place: str) -> "Subwords":
        """Of the content of a tokenizer.json, which is from `place`.

        Raises:
            UserError: it is none.
        """
        library = tokenizers()
        try:
            return cls(library.Tokenizer.from_str(content))
        except Exception as error:  # the library has no type of its own for this
            raise UserError(f"data.tokenizer: {place} is no {FILE}: {error}") from error

    @property
    def state(self) -> dict[str, Any]:
        return {"kind": "subwords", "sha256": hashlib.sha256(self.to_json().encode()).hexdigest()}

    def to_json(self) -> str:
        return self.tokenizer.to_str()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decoder(self) -> Decoder:
        return SubwordDecoder(self.tokenizer)


class Learned:
    """Stands for the `Subwords` that byte pair encoding makes of a text: at most `size` of them.

    Raises:
        UserError: the size leaves no room for all bytes and the separator.
    """

    def __init__(self, size: int):
        tokenizers()
        if size <= VOCAB_SIZE + 1:
            raise UserError(f"data.tokenizer_size must be above {VOCAB_SIZE + 1} with data.tokenizer bpe, got {size}")
        self.size = size

    @property
    def state(self) -> dict[str, Any]:
        return {"kind": "bpe", "size": self.size, "learned_from": LEARNED_FROM}

    def learn(self, texts: Iterable[str]) -> Subwords:
        library = tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=self.size,
            special_tokens=[SEPARATORS[0]],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return Subwords(tokenizer)


def tokenizers() -> Any:
    # Otherwise it warns of every process that loads data, none of which tokenises.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return needed("tokenizers", "tokenizers", "data.tokenizer")


def read_tokenizer(path: Path) -> Subwords:
    """The tokenizer in a tokenizer.json.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.tokenizer: {str(path)!r} cannot be read: {reason}") from error
    return Subwords.from_json(content, str(path))


def restored(content: str | None) -> Tokenizer:
    """The tokenizer whose `to_json` this is."""
    return Bytes() if content is None else Subwords.from_json(content, "what the checkpoint holds")


def tokenizer_of(option: str, size: int | None) -> tuple[Tokenizer | Learned, int]:
    """The tokenizer for the options data.tokenizer and data.tokenizer_size, and the size of the model's vocabulary.

    Raises:
        UserError: there is no such tokenizer, or its tokens do not fit the vocabulary.
    """
    if option == "bpe":
        if size is None:
            raise UserError("data.tokenizer bpe needs data.tokenizer_size, how many tokens to learn, such as 4096")
        return Learned(size), size
    if option != "bytes" and not option.endswith(".json"):
        raise UserError(f"data.tokenizer must be bytes, bpe, or the path of a {FILE}, got {option!r}")
    tokenizer = Bytes() if option == "bytes" else read_tokenizer(Path(option))
    if size is not None and size < tokenizer.size:
        raise UserError(f"data.tokenizer_size is {size}, too small for the {tokenizer.size} tokens of {option}")
    return tokenizer, size or tokenizer.size
