"""Counting the tokens of prompts."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ddmd_jax.data import DataFileError

# The files of a transformers folder that decide on tokens; weights may lie beside them.
PARTS = ('tokenizer*', 'vocab*', 'merges*', 'added_tokens.json', 'special_tokens_map.json',
         '*.model')


class Counter(NamedTuple):
    """`count(texts)` gives the tokens of each, special ones included; `identity` is sha256."""

    identity: str
    count: Callable[[Sequence[str]], list[int]]  # type: ignore[assignment]  # not tuple.count


def of_folder(folder: Path) -> Counter:
    """The tokenizer in a folder that transformers wrote.

    Raises:
      DataFileError: it is missing or cannot be read.
    """
    files = sorted({f for part in PARTS for f in folder.glob(part) if f.is_file()})
    if not files:
        raise DataFileError(f'--tokenizer {folder} holds no tokenizer; give a folder that '
                            'transformers wrote')
    from transformers import AutoTokenizer

    try:
        library = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # transformers and tokenizers raise whatever comes
        reason = ' '.join(str(e).split())[:160] or type(e).__name__
        raise DataFileError(f'--tokenizer {folder} cannot be read ({reason})') from e
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    # verbose: no warning of prompts longer than the model takes; they are counted here.
    return Counter(hasher.hexdigest(), lambda texts: [
        len(ids) for ids in library(list(texts), verbose=False)['input_ids']])
