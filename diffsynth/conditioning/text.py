"""Prompts: cleaned, tokenised, encoded."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import VIDEO, argument, names_read
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, MissingModelError, MissingPackageError, UnusedInputError

if TYPE_CHECKING:
    from torch import Tensor

    from diffsynth.conditioning.text_cache import TextCache
    from diffsynth.conditioning.tokenizer import Tokenizer

logger = logging.getLogger("diffsynth")
MAX_LISTED_WORDS = 200
# Printable ASCII without the & of HTML, which ftfy returns as it is; spares its import, 0.1 s.
_NOTHING_TO_MEND = re.compile(r"[ -%'-~\t\n\r]*")


def clean_prompt(text: str) -> str:
    """Mend broken characters, undo HTML twice, make every run of white space one blank.

    Raises:
        MissingPackageError: where ftfy is not installed and the text may need it.

    Source: Wan2.1 ``wan/modules/tokenizers.py``, clean="whitespace".
    """
    if not _NOTHING_TO_MEND.fullmatch(text):
        try:
            import ftfy
        except ModuleNotFoundError as error:
            needed_for = "a prompt of other characters than plain ASCII"
            raise MissingPackageError("ftfy", needed_for, "pip install ftfy") from error
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextInputs:
    """What to show, and what not to."""

    prompt: str | Sequence[str] | None = argument(
        None, help="What to show: one text, or a list for a batch.", kind="text", group=VIDEO, flags=()
    )
    # not read when cfg_scale is 1
    negative_prompt: str | Sequence[str] = argument(
        "", help="What to keep away from.", kind="text", group=VIDEO
    )
    prompt_embeds: Tensor | None = argument(
        None, help="(B, tokens, text_dim of the DiT), in place of `prompt`.", kind="object"
    )
    negative_prompt_embeds: Tensor | None = argument(
        None, help="(B or 1, tokens, text_dim), in place of `negative_prompt`.", kind="object"
    )
    num_videos_per_prompt: int = 1
    cache_text: str | Path | None = None
    cfg_scale: float = 5.0
    cfg_scale_low_noise: float | None = None

    def __post_init__(self) -> None:
        prompt = "" if self.prompt is None else self.prompt
        for name, given in (("prompt", prompt), ("negative_prompt", self.negative_prompt)):
            texts = [given] if isinstance(given, str) else given
            if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
                raise ArgumentError(f"{name} is {given!r}; give a text, or a list of texts.")

    @property
    def is_guided(self) -> bool:
        """Whether the negative side is asked for."""
        return self.cfg_scale != 1.0 or self.cfg_scale_low_noise not in (None, 1.0)

    @property
    def num_prompts(self) -> int:
        """Samples before num_videos_per_prompt."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[0]
        return 1 if self.prompt is None or isinstance(self.prompt, str) else len(self.prompt)

    @property
    def distinct_texts(self) -> list[str]:
        """Every text that features are needed of, cleaned."""
        prompt = "" if self.prompt is None else self.prompt
        sides = [prompt] if self.prompt_embeds is None else []
        sides += [self.negative_prompt] if self.is_guided and self.negative_prompt_embeds is None else []
        texts = [text for side in sides for text in ([side] if isinstance(side, str) else side)]
        return list(dict.fromkeys(map(clean_prompt, texts)))


class TextConditioner:
    """Text to features, each distinct prompt once."""

    Inputs: ClassVar[type] = TextInputs
    encoder: ClassVar[str | None] = "text_encoder"

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset(names_read([TextInputs]))

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset({"prompt"})

    def applies(self, inputs: TextInputs, parts: Components) -> bool:
        _check_one_source("prompt", inputs.prompt, inputs.prompt_embeds)
        _check_one_source("negative_prompt", inputs.negative_prompt, inputs.negative_prompt_embeds)
        if inputs.prompt is None and inputs.prompt_embeds is None:
            raise ArgumentError("There is no prompt; give prompt=, or prompt_embeds=.")
        if not isinstance(inputs.prompt, str) and inputs.prompt is not None and len(inputs.prompt) == 0:
            raise ArgumentError("prompt is an empty list; give at least one text.")
        _check_negatives(inputs)
        has_encoder = parts.text_encoder is not None and parts.tokenizer is not None
        cache = _cache(inputs, parts)
        if cache is not None and not inputs.distinct_texts:
            raise UnusedInputError("cache_text was given, but there is no text to encode; leave it out.")
        is_needed = self.needs_encoder(inputs, parts)
        if cache is not None and is_needed and has_encoder:
            cache.check()
        if is_needed and not has_encoder:
            which = (
                "prompt_embeds="
                if inputs.prompt_embeds is None
                else "negative_prompt_embeds= (or cfg_scale=1)"
            )
            lack = "" if cache is None else f", and {inputs.cache_text} lacks a text of this call"
            raise MissingModelError(
                f"No text encoder is loaded{lack}; load one (models_t5_umt5-xxl-enc-bf16.pth) or give "
                f"{which}."
            )
        return True

    def needs_encoder(self, inputs: TextInputs, parts: Components) -> bool:
        cache = _cache(inputs, parts)
        return any(cache is None or cache.find(text) is None for text in inputs.distinct_texts)

    def encode(self, inputs: TextInputs, geometry: Geometry, parts: Components) -> Contribution:
        return Contribution(text=self.features(inputs, parts))

    def features(self, inputs: TextInputs, parts: Components) -> tuple[Tensor, Tensor | None]:
        """Both sides, (B, tokens, D) with zero rows behind the shorter; None: without guidance."""
        cache = _cache(inputs, parts)
        rows = inputs.prompt_embeds
        count = inputs.num_prompts
        features = (
            [*rows]
            if rows is not None
            else self._encode(_as_list(inputs.prompt or "", count, "prompt"), parts, cache)
        )
        positive = _pad(_repeat(features, inputs.num_videos_per_prompt))
        if not inputs.is_guided:
            return positive, None
        negative_rows = inputs.negative_prompt_embeds
        if negative_rows is None:
            texts = _as_list(inputs.negative_prompt, count, "negative_prompt")
            negatives = self._encode(texts, parts, cache)
        else:
            negatives = [*negative_rows.expand(count, -1, -1)]
        return positive, _pad(_repeat(negatives, inputs.num_videos_per_prompt))

    def _encode(self, texts: Sequence[str], parts: Components, cache: TextCache | None) -> list[Tensor]:
        """Features (tokens, D) of every text, without padding; equal texts are encoded once."""
        known: dict[str, Tensor] = {}
        cleaned = [clean_prompt(text) for text in texts]
        for text in dict.fromkeys(cleaned):
            _warn_of_unknown_words(text, parts.known_words)
            if parts.tokenizer is not None:
                _warn_of_cut(text, parts.tokenizer)
            cached = None if cache is None else cache.find(text)
            known[text] = _features(text, parts) if cached is None else cached.to(parts.device)
            if cache is not None and cached is None:
                cache.store(text, known[text])
            elif cache is not None and not cache.has_encoder:
                logger.info("No text encoder is loaded: features of %r are taken as cached.", text)
        return [known[text] for text in cleaned]


def _cache(inputs: TextInputs, parts: Components) -> TextCache | None:
    if inputs.cache_text is None:
        return None
    from diffsynth.conditioning.text_cache import TextCache

    return TextCache(inputs.cache_text, parts)


def _features(text: str, parts: Components) -> Tensor:
    """One cleaned text through the encoder, (tokens, D)."""
    import torch

    assert parts.tokenizer is not None and parts.text_encoder is not None
    ids, _ = parts.tokenizer.batch([text])
    with torch.no_grad():
        return parts.text_encoder(ids.to(parts.device))[0]


def _check_one_source(name: str, text: str | Sequence[str] | None, embeds: Tensor | None) -> None:
    if embeds is None:
        return
    if text is not None and len(text) > 0:
        raise ArgumentError(f"{name} and {name}_embeds are both given; give one of them.")
    if embeds.ndim != 3:
        raise ArgumentError(f"{name}_embeds has shape {tuple(embeds.shape)}; expected (B, tokens, text_dim).")


def _check_negatives(inputs: TextInputs) -> None:
    rows, count = inputs.negative_prompt_embeds, inputs.num_prompts
    if not inputs.is_guided and rows is not None:
        raise ArgumentError(
            "negative_prompt_embeds is not read when cfg_scale is 1; leave it out or raise cfg_scale."
        )
    if rows is not None and rows.shape[0] not in (1, count):
        raise ArgumentError(f"negative_prompt_embeds has {rows.shape[0]} rows; expected 1 or {count}.")
    if inputs.is_guided and rows is None:
        _as_list(inputs.negative_prompt, count, "negative_prompt")


def _as_list(texts: str | Sequence[str], count: int, name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts] * count
    if len(texts) != count:
        raise ArgumentError(
            f"{name} has {len(texts)} texts for {count} prompts; give one, or as many as prompts."
        )
    return list(texts)


def _repeat(rows: list[Tensor], times: int) -> list[Tensor]:
    return [row for row in rows for _ in range(times)]


def _pad(rows: list[Tensor]) -> Tensor:
    """(tokens, D) each -> (B, longest, D), zero rows behind: the DiT takes them for padding."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(rows, batch_first=True)


def _warn_of_unknown_words(text: str, known: frozenset[str]) -> None:
    if known:
        for word in re.findall(r"[^\W\d_]+", text.lower()):
            if word not in known:
                _warn_of(word, known)


@cache
def _warn_of(word: str, known: frozenset[str]) -> None:
    """Once for each word: a dataset says the same ones in every caption."""
    listed = ", ".join(sorted(known)[:MAX_LISTED_WORDS])
    logger.warning("This small model was not taught %r. It knows: %s.", word, listed)


@lru_cache(maxsize=1000)
def _warn_of_cut(text: str, tokenizer: Tokenizer) -> None:
    """Once for each text."""
    num_cut, kept = tokenizer.kept_words(text)
    if num_cut:
        logger.warning(
            "The last %d tokens of a prompt are not read: Wan reads %d. It is read up to: ... %s",
            num_cut, tokenizer.max_tokens, " ".join(kept[-8:]),
        )  # fmt: skip
