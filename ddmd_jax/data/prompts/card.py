"""The card of a set of prompts, ``card.json``: what it is made of."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ddmd_jax
from ddmd_jax.data.prompts.set import FORMAT, SPLITS, Written
from ddmd_jax.data.prompts.stages import DROPPED, Settings

DUPLICATES = {'exact_duplicates': 'equal to another after normalisation',
              'near_duplicates': 'near-duplicates of another'}


def settings_of(settings: Settings, tokenizer: str) -> dict[str, Any]:
    """The settings that decide on the result; a tokenizer by the sha256 of its files."""
    names = ('teacher', 'field', 'min_chars', 'max_chars', 'max_tokens', 'near_threshold',
             'validation')
    return {name: getattr(settings, name) for name in names} | {'tokenizer': tokenizer or None}


def fingerprint(settings: dict[str, Any], checksums: Sequence[str]) -> str:
    """Of settings and the content of the inputs, in whatever order and wherever they lie."""
    parts = [FORMAT, settings, sorted(checksums)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def differences(card: dict[str, Any], settings: dict[str, Any], checksums: Sequence[str]) -> str:
    """The settings and inputs in which a finished set differs from these."""
    names = [f'{n}: {card["settings"].get(n)} -> {v}' for n, v in settings.items()
             if card['settings'].get(n) != v]
    if sorted(i['sha256'] for i in card['inputs']) != sorted(checksums):
        names.append('other inputs')
    return ', '.join(names) or 'made by another version'


def make(settings: dict[str, Any], inputs: Sequence[dict[str, Any]], unique: int,
         near: Sequence[dict[str, Any]], near_count: int, written: Written) -> dict[str, Any]:
    """The card; no times or machine names: the same run gives the same card."""
    counts = {name: sum(i[name] for i in inputs) for name in ('read', *DROPPED, 'kept')}
    exact = counts.pop('kept') - unique
    return {
        'format': FORMAT, 'version': ddmd_jax.__version__, 'teacher': settings['teacher'],
        'identity': written.identity,
        'fingerprint': fingerprint(settings, [i['sha256'] for i in inputs]),
        'splits': written.splits, 'settings': settings, 'inputs': list(inputs),
        'counts': {**counts, 'exact_duplicates': exact, 'near_duplicates': near_count,
                   'written': sum(written.splits.values())},
        'chars': histogram(written.chars),
        'tokens': histogram(written.tokens) if settings['tokenizer'] else None,
        'near_examples': list(near),
    }


def histogram(lengths: Counter[int]) -> list[list[int]]:
    """[from, to, how many] with bounds that double: 1-1, 2-3, 4-7, ..."""
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    return [[2**b // 2, 2**b - 1, bins[b]] for b in range(min(bins), max(bins) + 1)]


def warnings(card: dict[str, Any]) -> list[str]:
    """Warnings about a finished set, a line each."""
    counts = card['counts']
    dropped = [f'{counts[name]} of {counts["read"]} prompts dropped: {words}'
               for name, words in (DROPPED | DUPLICATES).items() if counts[name]]
    return dropped + [f'no prompt fell into {s}; {sum(card["splits"].values())} in all'
                      for s in SPLITS if not card['splits'][s]]
