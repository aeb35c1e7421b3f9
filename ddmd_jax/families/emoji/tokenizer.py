"""The small WordPiece tokenizer of the embedded default (library: `tokenizers`)."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddmd_jax.families.emoji.data import RESTORE_HINT, TOKENIZER, DataFileError

PAD, UNK, BOS = '[PAD]', '[UNK]', '[BOS]'


@functools.cache
def load(path: Path = TOKENIZER):
    """The shipped tokenizer; raises `DataFileError` if it is missing or damaged."""
    import tokenizers as tk

    if not path.exists():
        raise DataFileError(f'tokenizer missing: {path}; {RESTORE_HINT}')
    try:
        return tk.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise DataFileError(f'tokenizer damaged: {path}; {RESTORE_HINT}') from e


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
