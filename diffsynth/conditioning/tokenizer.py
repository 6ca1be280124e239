"""Words to token ids, by the vocabulary that lies beside a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffsynth.errors import TokenizerNotFoundError

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT, PADDING = 1, 0  # ids of </s> and <pad> in every umT5 vocabulary
FILES = ("spiece.model", "tokenizer.json")
FOLDERS = (
    "google/umt5-xxl",
    "tokenizer",
    ".",
    "../tokenizer",
    "../google/umt5-xxl",
)  # seen from the text encoder's


class _Vocabulary(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def size(self) -> int: ...


class _Sentencepiece:
    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def size(self) -> int:
        return int(self._model.vocab_size())


class _TokenizersJson:
    def __init__(self, file: Path) -> None:
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(str(file))
        self._model.no_padding()
        self._model.no_truncation()

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def size(self) -> int:
        return int(self._model.get_vocab_size())


class Tokenizer:
    """A umT5 vocabulary.

    Args:
        source: ``spiece.model`` (sentencepiece) or ``tokenizer.json`` (tokenizers), or a sentencepiece
            model's bytes.
        max_tokens: longer texts are cut; </s> stays.
    """

    def __init__(self, source: Path | bytes, max_tokens: int = 512) -> None:
        self.max_tokens = max_tokens
        self._vocabulary: _Vocabulary
        if isinstance(source, bytes):
            self._vocabulary = _Sentencepiece(source)
        elif source.suffix == ".model":
            self._vocabulary = _Sentencepiece(source.read_bytes())
        else:
            self._vocabulary = _TokenizersJson(source)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._vocabulary.size()

    def encode(self, text: str) -> list[int]:
        """Ids of one cleaned text, </s> last. An empty text is </s> alone."""
        return [*self._vocabulary.encode(text)[: self.max_tokens - 1], END_OF_TEXT]

    def kept_words(self, text: str) -> tuple[int, list[str]]:
        """How many tokens of a cleaned text are beyond the limit, and the words that are read."""
        most, words = self.max_tokens - 1, text.split(" ")  # </s> takes one
        num_cut = len(self._vocabulary.encode(text)) - most
        if num_cut <= 0:
            return 0, words
        low, high = 0, len(words)
        while low < high:  # the most words whose tokens fit
            middle = (low + high + 1) // 2
            fits = len(self._vocabulary.encode(" ".join(words[:middle]))) <= most
            low, high = (middle, high) if fits else (low, middle - 1)
        return num_cut, words[:low]

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of several texts, both (B, longest) int64, padded at the end."""
        import torch

        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask


def find_tokenizer(text_encoder_file: Path | None, tokenizer_path: str | Path | None = None) -> Path:
    """Return the vocabulary file: at ``tokenizer_path``, or in the usual folders beside the text encoder.

    Raises:
        TokenizerNotFoundError: names every place that was looked at.
    """
    if tokenizer_path is not None:
        given = Path(tokenizer_path)
        candidates = (
            [given]
            if given.is_file()
            else [folder / name for folder in (given, given / FOLDERS[0]) for name in FILES]
        )
    elif text_encoder_file is not None:
        folder = text_encoder_file if text_encoder_file.is_dir() else text_encoder_file.parent
        candidates = [folder / place / name for place in FOLDERS for name in FILES]
    else:
        candidates = []
    for candidate in candidates:
        if candidate.is_file() and candidate.name.endswith((".model", ".json")):
            return candidate
    raise TokenizerNotFoundError([str(candidate) for candidate in candidates])
