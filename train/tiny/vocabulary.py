"""Make the tokenizer of the tiny Wan: a sentencepiece model with umT5's special pieces and few words.

    python train/tiny/vocabulary.py [--output FOLDER] [--size 640]

It is learned from captions of the grammar, and from words that no caption uses yet: each of those is one
piece too, so that a LoRA can teach a new word without touching the tokenizer. Every other text falls back to
letters and bytes, and upper case is read as lower case. The same call always writes the same file.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path

import sentencepiece

from diffsynth.tiny import tiny_folder
from diffsynth.tiny.grammar import caption, known_words, random_scene

RESERVED_WORDS = """
heart diamond cross ring moon arrow hexagon pentagon oval line cube ball box wheel spiral flower shape
object
magenta teal lime gold silver navy violet beige maroon turquoise dark light bright pale neon colorful color
spins turns rotates bounces jumps flies runs walks swims dances rolls shakes fades blinks waves appears
vanishes
spinning turning rotating bouncing jumping flying running walking swimming dancing rolling fading blinking
fast slow quickly slowly diagonal clockwise zigzag circling forward backward away toward near far
cat dog bird fish horse elephant rabbit mouse bear lion tiger fox cow sheep frog bee person man woman child
wood metal glass stone paper water fire ice snow sand grass cloud sky sun sea river mountain forest city
street
house room tree car boat train plane road night day morning evening
camera zoom pan tilt close wide view shot scene style cartoon pixel painting sketch photo film
striped dotted spotted outlined filled hollow shiny soft round long short tall tiny huge many two three four
middle top bottom corner center side edge with without under behind above below between
he she it they we you this that these those one ten some all each other another same different
happy sad angry old young new good bad beautiful hot cold open closed
eats sleeps looks sits talks rides drives
head hand eye face leg tail wing leaf shadow smoke rain wind dust floor wall door window table chair
vibrates pulses grow shrink slide rise fall leftwards rightwards upward downward disc spark bubble
"""
NUM_CAPTIONS = 12_000
REPEATS = 60  # of every reserved word: about as frequent as the rarer words of the captions


def corpus() -> list[str]:
    """Return the texts that the pieces are learned from, always the same."""
    rng = random.Random(0)
    texts = [caption(random_scene(rng, 1 + index % 2), rng) for index in range(NUM_CAPTIONS)]
    words = [*RESERVED_WORDS.split(), *known_words()]
    for _ in range(REPEATS):
        rng.shuffle(words)
        texts.extend(" ".join(words[first : first + 8]) for first in range(0, len(words), 8))
    return texts


def train_vocabulary(size: int) -> bytes:
    """Return a sentencepiece model of ``size`` pieces; ids 0, 1, 2 are padding, end, unknown, as in umT5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,!?'-:;()",
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Write ``google/umt5-xxl/spiece.model`` into the folder, and say what it holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=tiny_folder(), help="folder of the tiny Wan")
    parser.add_argument("--size", type=int, default=640, help="number of pieces, of which 256 are bytes")
    given = parser.parse_args()
    file = given.output / "google" / "umt5-xxl" / "spiece.model"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(train_vocabulary(given.size))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    split = [word for word in (*RESERVED_WORDS.split(), *known_words()) if len(pieces.encode(word)) > 1]
    print(f"{file}: {pieces.vocab_size()} pieces, {file.stat().st_size / 1024:.0f} KiB")
    print(f"words of more than one piece: {', '.join(split) or 'none'}")


if __name__ == "__main__":
    main()
