"""From files of prompts to a set of prompts: read, filtered, without repetitions, split.

    settings = prompts.Settings(input=('captions.jsonl',), field='caption')
    prompts.prepare(settings, Path('data/captions'))
    train = prompts.open_set('data/captions')

Everything is built in a folder beside the set, ``DIR.partial``, and put in place at the very
end; a run that was stopped goes on there. The result depends on the prompts alone, not on their
order or on the files they come from.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddmd_jax.data import DataFileError
from ddmd_jax.data.prompts import (
    card as cards,
    files,
    near,
    set as sets,
    stages,
    tokens as prompt_tokens,
)
from ddmd_jax.data.prompts.set import PromptSet, open_set
from ddmd_jax.data.prompts.stages import Settings
from ddmd_jax.util.files import lock, replacing

__all__ = ['PromptSet', 'Settings', 'open_set', 'prepare']
EXAMPLES = 10  # pairs of near-duplicates that the card shows


def prepare(settings: Settings, out: Path, counter: prompt_tokens.Counter | None = None,
            ) -> tuple[dict[str, Any], bool]:
    """The card of the set of prompts at `out`, and whether it was there already.

    Args:
      settings: of the set.
      out: its folder.
      counter: counts the teacher's tokens, unless `settings.tokenizer` names another tokenizer.

    Raises:
      DataFileError: an input or the tokenizer is not as it should be, no prompt is left, `out`
        cannot be written or holds something else, the disk is full.
    """
    out = out.expanduser().resolve()
    partial = Path(f'{out}{sets.PARTIAL}')
    if sets.is_partial(out):
        raise DataFileError(f'--out {out}: {sets.PARTIAL} is how unfinished sets are called; '
                            'choose another')
    sources = [files.find(name) for name in settings.input]
    if settings.tokenizer:
        counter = prompt_tokens.of_folder(Path(settings.tokenizer).expanduser())
    if settings.max_tokens is not None and counter is None:
        raise DataFileError(f'--max_tokens needs --tokenizer: {settings.teacher} has none here')
    asked = cards.settings_of(settings, counter.identity if counter else '')
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            card = _finished(out, asked, sources)
            shutil.rmtree(partial, ignore_errors=True)  # of a run stopped after its last step
            return card, True
        with _locked(partial):
            return _build(settings, asked, sources, counter, partial, out), False
    except OSError as e:
        if e.errno in sets.DISK_FULL:
            raise DataFileError(f'disk full: {partial} ({e.strerror}); free some space and run '
                                'the same command again, finished inputs are kept') from e
        raise DataFileError(f'{e.filename or out}: {e.strerror or e}') from e


def _finished(out: Path, asked: dict[str, Any], sources: Sequence[files.Source]) -> dict[str, Any]:
    """The card of the finished set at `out`, if its settings and inputs are these."""
    if not (out / sets.CARD).is_file():
        raise DataFileError(f'--out {out} exists and is no set of prompts; choose another')
    card, checksums = sets.read_card(out), [s.checksum for s in sources]
    if card['fingerprint'] != cards.fingerprint(asked, checksums):
        raise DataFileError(f'--out {out} holds another set of prompts '
                            f'({cards.differences(card, asked, checksums)}); choose another or '
                            'delete it')
    return card


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Makes the folder and locks it; removes it at the end if it holds no finished input."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file, holder = lock(partial / 'lock')
    except OSError as e:
        raise DataFileError(f'--out {partial} cannot be made ({e.strerror}); choose another') from e
    if file is None:
        raise DataFileError(f'{partial} is being written by {holder}')
    with file:
        try:
            yield
        finally:
            if partial.is_dir() and not any(partial.glob('*.json')):
                shutil.rmtree(partial)


def _bar(what: str, total: int, unit: str) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, file=sys.stderr,
                dynamic_ncols=True, mininterval=1.0)


def _build(settings: Settings, asked: dict[str, Any], sources: Sequence[files.Source],
           counter: prompt_tokens.Counter | None, partial: Path, out: Path) -> dict[str, Any]:
    with _bar('reading', sum(s.size for s in sources), 'B') as bar:
        staged = [stages.stage(s, settings, counter, partial, bar) for s in sources]
    lines = stages.Lines([path for path, _ in staged], settings.validation)
    inputs = [found for _, found in staged]
    if not len(lines):
        shutil.rmtree(partial)
        raise DataFileError(f'no prompt is left: {_drops(inputs)}')
    lines.take(np.unique(lines.ids, return_index=True)[1])
    unique = len(lines)
    examples, dropped = _drop_near(lines, settings.near_threshold)
    with replacing(out, sync=True) as whole:
        with _bar('writing', len(lines), ' prompts') as bar:
            written = sets.write(lines, whole, bar.update)
        card = cards.make(asked, inputs, unique, examples, dropped, written)
        (whole / sets.CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False), 'utf-8')
    shutil.rmtree(partial)
    return card


def _drops(inputs: Sequence[dict[str, Any]]) -> str:
    total = lambda name: sum(i[name] for i in inputs)
    return ', '.join([f'{total("read")} read'] + [
        f'{total(name)} {words}' for name, words in stages.DROPPED.items() if total(name)])


def _drop_near(lines: stages.Lines, threshold: float) -> tuple[list[dict[str, Any]], int]:
    """Takes near-duplicates out of `lines`: (pairs to show, how many)."""
    with _bar('comparing', len(lines), ' prompts') as bar:
        twins = near.find(lines, threshold, bar.update)
    shown = [{'similarity': round(alike, 4), 'dropped': lines[row], 'kept': lines[kept]}
             for row, (kept, alike) in list(twins.items())[:EXAMPLES]]
    keep = np.ones(len(lines), bool)
    keep[list(twins)] = False
    lines.take(np.flatnonzero(keep))
    return shown, len(twins)
