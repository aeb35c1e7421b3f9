"""The tokenizer of the embedded world: a word, a token (library: `tokenizers`)."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import tokenizers as tk

from ddmd_jax.families.emoji import scenes

PAD, UNK, BOS = '[PAD]', '[UNK]', '[BOS]'


@functools.cache
def load() -> tk.Tokenizer:
    """Lower-cased words of the captions; every text starts with ``[BOS]``."""
    vocabulary = {word: i for i, word in enumerate((PAD, UNK, BOS, *scenes.words()))}
    found = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token=UNK))
    found.add_special_tokens([PAD, UNK, BOS])
    found.normalizer = tk.normalizers.Lowercase()
    found.pre_tokenizer = tk.pre_tokenizers.Whitespace()
    found.post_processor = tk.processors.TemplateProcessing(
        single=f'{BOS} $A', special_tokens=[(BOS, vocabulary[BOS])])
    return found


def identity() -> str:
    """Names the words and their order: a text encoder is one of these."""
    return hashlib.sha256(' '.join(scenes.words()).encode()).hexdigest()[:16]


def encode(texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[n, length]`` int32 and mask ``[n, length]`` bool; longer texts are cut.

    The empty text is a real row of one token, ``[BOS]``: the null prompt.
    """
    ids = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(load().encode_batch(list(texts))):
        kept = encoding.ids[:length]
        ids[row, :len(kept)], mask[row, :len(kept)] = kept, True
    return ids, mask


def cut(texts: Sequence[str], length: int) -> np.ndarray:
    """Which texts `encode` cuts, ``[n]`` bool."""
    return np.asarray([len(encoding.ids) > length
                       for encoding in load().encode_batch(list(texts))], bool)


def unknown(texts: Sequence[str]) -> np.ndarray:
    """Which texts have words that no caption has, ``[n]`` bool."""
    return np.asarray([UNK in encoding.tokens for encoding in load().encode_batch(list(texts))],
                      bool)
