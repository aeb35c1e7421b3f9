"""From files of prompts to a set of prompts: read, filtered, without repetitions, split.

    settings = prompts.Settings(input=('captions.jsonl',), field='caption')
    prompts.prepare(settings, Path('data/captions'))
    train = prompts.open_set('data/captions')

The set is there whole or not at all. It depends on the prompts alone, not on their order or on
the files they come from. Everything is in memory meanwhile, 0.7 GB per million prompts.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ddmd_jax
from ddmd_jax.data import DataFileError, records
from ddmd_jax.data.prompts import files, near, text
from ddmd_jax.data.prompts.set import CARD, FORMAT, SPLITS, PromptSet, open_set, read_card
from ddmd_jax.util import buckets, places
from ddmd_jax.util.files import replacing, write_json
from ddmd_jax.util.places import Place

__all__ = ['PromptSet', 'Settings', 'open_set', 'prepare', 'summary']
EXAMPLES = 10  # pairs of near-duplicates that the card shows
DROPPED = {'empty': 'empty', 'too_short': 'shorter than --min_chars',
           'too_long': 'longer than --max_chars',
           'exact_duplicates': 'equal to another after normalisation',
           'near_duplicates': 'near-duplicates of another'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Inputs and filters of a set of prompts; every field is a flag of the command."""

    input: tuple[str, ...]
    field: str = 'prompt'
    min_chars: int = 1
    max_chars: int = 2000
    near_threshold: float = 0.85
    validation: float = 0.01


def prepare(settings: Settings, out: Place) -> tuple[dict[str, Any], bool]:
    """The card of the set of prompts at `out`, and whether it was there already.

    Raises:
      DataFileError: an input is not as it should be, no prompt is left, `out` cannot be written
        or holds something else, the disk is full.
    """
    out = places.of(out)
    named = [places.of(name) for name in settings.input]
    paths = [buckets.local(place) for place in named]
    streams = [files.read(path, settings.field) for path in paths]  # all of them are there
    asked = dataclasses.asdict(settings)
    del asked['input']  # files may be moved; their content counts
    try:
        inputs = [{'input': str(place), 'sha256': _sha256(path)}
                  for place, path in zip(named, paths)]
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            return _finished(out, asked, inputs), True
        if not places.is_url(out):
            out = out.resolve()
            out.parent.mkdir(parents=True, exist_ok=True)
        found, counts = _read(settings, paths, streams)
        # Of near-duplicates that one stays whose digest is lowest, whatever order they came in.
        keys = sorted(found)
        ordered = [found[key] for key in keys]
        twins = near.find(ordered, settings.near_threshold)
        examples = [{'similarity': round(alike, 4), 'dropped': ordered[row], 'kept': ordered[kept]}
                    for row, (kept, alike) in itertools.islice(twins.items(), EXAMPLES)]
        for row in twins:
            del found[keys[row]]
        counts['near_duplicates'] = len(twins)
        with replacing(out, sync=True, own=True) as scratch:
            scratch.mkdir()
            identity, splits = _write(found, settings.validation, scratch)
            # No times or machine names: the same command gives the same card.
            card = {'format': FORMAT, 'version': ddmd_jax.__version__, 'identity': identity,
                    'splits': splits, 'settings': asked, 'inputs': inputs, 'counts': counts,
                    'near_examples': examples}
            write_json(scratch / CARD, card)
    except OSError as e:
        raise DataFileError(f'{e.filename or out}: {e.strerror or e}; no set was written, mend it '
                            'and run the same command again') from e
    return card, False


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _finished(out: Place, asked: dict[str, Any],
              inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The card of the set that is at `out`, if its settings and inputs are these."""
    if not (out / CARD).is_file():
        raise DataFileError(f'--out {out} exists and is no set of prompts; choose another')
    card = read_card(out)
    other = [f'{name}: {card["settings"].get(name)} -> {value}' for name, value in asked.items()
             if card['settings'].get(name) != value]
    if sorted(i['sha256'] for i in card['inputs']) != sorted(i['sha256'] for i in inputs):
        other.append('other inputs')
    if other:
        raise DataFileError(f'--out {out} holds another set of prompts ({", ".join(other)}); '
                            'choose another or delete it')
    return card


def _read(settings: Settings, paths: Sequence[Path],
          streams: Sequence[Any]) -> tuple[dict[bytes, str], dict[str, int]]:
    """Normalised prompts of some length by their digests, and how many were dropped by reason."""
    found: dict[bytes, str] = {}
    counts = Counter({'read': 0, **dict.fromkeys(DROPPED, 0)})
    for path, stream in zip(paths, streams):
        before = counts['read'] - counts['empty']
        for prompt in map(text.normalise, stream):
            counts['read'] += 1
            if not prompt:
                counts['empty'] += 1
            elif len(prompt) < settings.min_chars:
                counts['too_short'] += 1
            elif len(prompt) > settings.max_chars:
                counts['too_long'] += 1
            elif (digest := text.digest(prompt)) in found:
                counts['exact_duplicates'] += 1
            else:
                found[digest] = prompt
        if counts['read'] - counts['empty'] == before:
            raise DataFileError(f'{path} holds no prompts')
    if not found:
        raise DataFileError(f'no prompt is left: {summary(counts)}')
    return found, counts


def _write(found: dict[bytes, str], share: float, folder: Path) -> tuple[str, dict[str, int]]:
    """Writes the splits, in the order of digests: (the set's identity, prompts of each)."""
    hasher, splits = hashlib.sha256(), {}
    for split in SPLITS:
        keys = sorted(k for k in found if text.in_validation(k, share) == (split == SPLITS[1]))
        records.write(folder / f'{split}.array_record', (found[key].encode() for key in keys))
        hasher.update(f'{split} {len(keys)}\n'.encode() + b''.join(keys))
        splits[split] = len(keys)
    return hasher.hexdigest()[:16], splits


def summary(counts: dict[str, int]) -> str:
    """How many prompts were read, and dropped by reason."""
    return ', '.join([f'{counts["read"]} read'] + [
        f'{counts[name]} {words}' for name, words in DROPPED.items() if counts[name]])
