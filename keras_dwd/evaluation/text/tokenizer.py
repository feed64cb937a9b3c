"""Tokenizers: bytes, byte pair encoding (BPE) learned from text, or that of a preset."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from keras_dwd.checks import integer

PAD, SEPARATOR, END = 0, 1, 2
"""Tokens that are no text: padding, the end of a prompt, the end of what is written."""

_SPECIAL = 3


class Tokenizer(Protocol):
    """What turns text into tokens and back.

    Attributes:
        pad: A token for padding.
        start: Tokens before a prompt.
        separator: Tokens between a prompt and what is written.
        end: The token after what is written.
    """

    pad: int
    start: tuple[int, ...]
    separator: tuple[int, ...]
    end: int

    @property
    def size(self) -> int:
        """The number of tokens, with those that are no text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""

    def decode(self, tokens: Sequence[Iterable[int]]) -> list[str]:
        """The text of each list of tokens; those that are no text are left out."""


class _Own:
    """Tokens from 3 on are text."""

    pad = PAD
    start: tuple[int, ...] = ()
    separator: tuple[int, ...] = (SEPARATOR,)
    end = END


class ByteTokenizer(_Own):
    """Each byte of UTF-8 is a token."""

    size = 256 + _SPECIAL

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        return [[byte + _SPECIAL for byte in text.encode()] for text in texts]

    def decode(self, tokens: Sequence[Iterable[int]]) -> list[str]:
        """The text of each list of tokens; bytes that are no UTF-8 become U+FFFD."""
        return [
            bytes(int(t) - _SPECIAL for t in each if t >= _SPECIAL).decode(errors="replace")
            for each in tokens
        ]


class BPETokenizer(_Own):
    """Byte pair encoding, by the library `tokenizers`. Every text has an encoding.

    Args:
        serialized: A tokenizer of the library as JSON, see `learn` and `serialized`.

    Reference:
        [Sennrich et al., 2016](https://arxiv.org/abs/1508.07909).
    """

    def __init__(self, serialized: str):
        self._inner = _library().Tokenizer.from_str(serialized)

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> "BPETokenizer":
        """Learn the encoding from text.

        Args:
            texts: The text.
            size: The number of tokens, at least 259; with little text there are fewer.
        """
        integer("size", size, ByteTokenizer.size)
        library = _library()
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size - _SPECIAL,
            show_progress=False,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner.to_str())

    @property
    def size(self) -> int:
        """The number of tokens, with those that are no text."""
        return int(self._inner.get_vocab_size()) + _SPECIAL

    def serialized(self) -> str:
        """The tokenizer as JSON."""
        return str(self._inner.to_str())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        encoded = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [[token + _SPECIAL for token in each.ids] for each in encoded]

    def decode(self, tokens: Sequence[Iterable[int]]) -> list[str]:
        """The text of each list of tokens; those that are no text are left out."""
        known = [[int(t) - _SPECIAL for t in each if t >= _SPECIAL] for each in tokens]
        return [str(text) for text in self._inner.decode_batch(known)]


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NEEDED) from None
    return tokenizers


NEEDED = 'Text needs further packages: pip install "keras_dwd[text]".'
"""What is said where a package of the extra `text` is not installed."""
