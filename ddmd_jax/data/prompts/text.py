"""A prompt's normal form, its id, the split it belongs to, and its tokens."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ddmd_jax.data import DataFileError
from ddmd_jax.util.text import first_line

# Control characters, halves of surrogate pairs (JSON escapes can hold one) and the byte order
# mark. Joiners of zero width stay: emoji and several scripts are spelled with them.
_CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff]')

# The files of a transformers folder that decide on tokens; weights may lie beside them.
_TOKENIZER = ('tokenizer*', 'vocab*', 'merges*', 'added_tokens.json', 'special_tokens_map.json',
              '*.model')


def normalise(text: str) -> str:
    """`text` in Unicode NFC, on one line, with single spaces and none at its ends."""
    return ' '.join(unicodedata.normalize('NFC', _CONTROL.sub(' ', text)).split())


def digest(prompt: str) -> bytes:
    """sha256 of a normalised prompt in UTF-8; the id and the split are parts of it."""
    return hashlib.sha256(prompt.encode()).digest()


def in_validation(digest: bytes, share: float) -> bool:
    """Whether a prompt is of the validation split: a matter of its own words alone.

    Stable when prompts are added; a larger `share` adds prompts and moves none back. Independent
    of the digest's first bytes, by which prompts are ordered.
    """
    return int.from_bytes(digest[8:16], 'big') < share * 2**64


class Counter(NamedTuple):
    """`count(texts)` gives the tokens of each, special ones included; `identity` is sha256."""

    identity: str
    count: Callable[[Sequence[str]], list[int]]  # type: ignore[assignment]  # not tuple.count


def counter_of(folder: Path) -> Counter:
    """The tokenizer in a folder that transformers wrote.

    Raises:
      DataFileError: it is missing or cannot be read.
    """
    files = sorted({f for part in _TOKENIZER for f in folder.glob(part) if f.is_file()})
    if not files:
        raise DataFileError(f'--tokenizer {folder} holds no tokenizer; give a folder that '
                            'transformers wrote')
    from transformers import AutoTokenizer

    try:
        library = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # transformers and tokenizers raise whatever comes
        raise DataFileError(f'--tokenizer {folder} cannot be read ({first_line(e)})') from e
    names = ''.join(f.name + hashlib.sha256(f.read_bytes()).hexdigest() for f in files)
    # verbose: no warning of prompts longer than the model takes; they are counted here.
    return Counter(hashlib.sha256(names.encode()).hexdigest(), lambda texts: [
        len(ids) for ids in library(list(texts), verbose=False)['input_ids']])
