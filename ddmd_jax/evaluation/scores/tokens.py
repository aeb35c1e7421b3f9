"""CLIP's tokens of a prompt, as open_clip and as transformers make them: they differ; and BERT's.

open_clip mends mojibake and curly quotes (ftfy) and turns HTML entities into characters, twice;
transformers does neither, and composes accents instead. Pairs of letters are then merged alike.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddmd_jax.util.errors import UserError
from ddmd_jax.util.text import first_line
from ddmd_jax.weights.flat import WeightsError

LENGTH = 77
VOCABULARY = Path(__file__).parent / 'files' / 'bpe_simple_vocab_16e6.txt.gz'
SHA256 = '924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a'
MERGES = 49152 - 256 - 2  # of the file's lines those that CLIP uses
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {'open_clip': ('<start_of_text>', '<end_of_text>'),
           'transformers': ('<|startoftext|>', '<|endoftext|>')}
BERT_LENGTH, BERT_SPECIAL = 35, ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
DMD2_PREFIX = 'A photo depicts '


def tokenize(prompts: Sequence[str], style: str = 'open_clip', prefix: str = '') -> np.ndarray:
    """Ids ``[N, 77] int32``: start, the prompt's tokens, end; the rest is 0.

    A longer prompt loses its end, behind which the end token still stands.

    Args:
      prompts: N texts.
      style: a key of `SPECIAL`: whose tokenizer.
      prefix: put before every prompt *as tokens*, so that it joins no word of the prompt.

    Raises:
      WeightsError: the vocabulary is damaged.
      UserError: ftfy is not installed (`open_clip` only).
    """
    tokenizer = _tokenizer(style)
    clean = _clean if style == 'open_clip' else lambda text: text
    encode = lambda text: tokenizer.encode(clean(text), add_special_tokens=False).ids
    start, end = (tokenizer.token_to_id(token) for token in SPECIAL[style])
    before = [start, *encode(prefix)]
    ids = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in zip(ids, prompts):
        found = [*before, *encode(prompt)][:LENGTH - 1] + [end]
        row[:len(found)] = found
    return ids


def _clean(text: str) -> str:
    try:
        import ftfy
    except ImportError as e:
        raise UserError('CLIP scores need ftfy, with which open_clip cleans prompts: '
                        'pip install ftfy') from e
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return ' '.join(text.split()).lower()


@functools.cache
def _tokenizer(style: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    merges = [tuple(line.split()) for line in _vocabulary().split('\n')[1:MERGES + 1]]
    letters = _letters()
    words = [*letters, *(x + '</w>' for x in letters), *map(''.join, merges), *SPECIAL[style]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges,
                                     end_of_word_suffix='</w>'))
    if style == 'transformers':
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT if style == 'transformers' else f'(?i){SPLIT}'),
                             behavior='removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_special_tokens(list(SPECIAL[style]))
    return tokenizer


def tokenize_bert(prompts: Sequence[str], file: Path) -> tuple[np.ndarray, np.ndarray]:
    """ImageReward's ids and mask ``[N, 35]``, int32 and bool: uncased BERT's, cut and padded.

    Raises:
      WeightsError: `file` is no vocabulary of BERT's.
    """
    found = _bert(file).encode_batch(list(prompts))
    return (np.asarray([x.ids for x in found], np.int32),
            np.asarray([x.attention_mask for x in found], bool))


@functools.cache
def _bert(file: Path) -> Any:
    from tokenizers import BertWordPieceTokenizer

    try:
        words = {word: i for i, word in enumerate(file.read_text('utf-8').split('\n')) if word}
        missing = [token for token in BERT_SPECIAL if token not in words]
    except (OSError, UnicodeDecodeError) as e:
        raise WeightsError(f"{file} cannot be read ({first_line(e)}); give bert-base-uncased's "
                           'vocab.txt') from e
    if missing:
        raise WeightsError(f"{file} has no {missing[0]}; give bert-base-uncased's vocab.txt")
    tokenizer = BertWordPieceTokenizer(words, lowercase=True)
    tokenizer.enable_truncation(BERT_LENGTH)
    tokenizer.enable_padding(pad_id=words['[PAD]'], length=BERT_LENGTH)
    return tokenizer


def _vocabulary() -> str:
    try:
        data = VOCABULARY.read_bytes()
    except OSError as e:
        raise WeightsError(f'{VOCABULARY} is missing; install the package again') from e
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise WeightsError(f"{VOCABULARY} is not CLIP's vocabulary; install the package again")
    return gzip.decompress(data).decode()


def _letters() -> list[str]:
    """A printable character for each byte: 188 stand for themselves, the others from U+0100 on."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(themselves)
    return [*map(chr, themselves), *(chr(256 + i) for i in range(others))]
