"""A set of prompts through a teacher's text encoder, into a folder to train from.

The folder's format is `data/embeddings.py`'s; what is written is what the online mode gives the
step, bit for bit up to how XLA fuses a batch of another size.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ddmd_jax.data import DataFileError, embeddings
from ddmd_jax.data.prompts.set import PromptSet
from ddmd_jax.families import TextEncoder
from ddmd_jax.parallel import sharding
from ddmd_jax.train import prompts as sources
from ddmd_jax.util.text import in_units

STEP = 32  # batches are cut to multiples of so many tokens: few programs, little padding


def plan(stored: PromptSet, text: TextEncoder, out: Path) -> tuple[embeddings.Job, Any]:
    """(what is to be written, the null prompt's arrays); encodes the null prompt only."""
    lengths = sources.token_counts(text, stored)
    null = jax.device_get(sources.in_bf16(jax.jit(text.apply)(text.params, text.tokenize(['']))))
    (null,) = embeddings.trimmed(null)
    settings = {
        'encoder': text.name, 'encoder_identity': text.identity, 'prompts': stored.identity,
        'split': stored.split, 'width': text.width,
        'length': int(max(lengths.max(), len(null['embeds']))),
        'dtype': embeddings.FLOAT.__name__}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    job = embeddings.Job(out, settings | {'identity': digest}, lengths,
                         text.width * np.dtype(embeddings.FLOAT).itemsize)
    return job, null


def write(job: embeddings.Job, null: Any, stored: PromptSet, text: TextEncoder, mesh: Mesh,
          rows: int) -> None:
    """Encodes what is not written yet, `rows` prompts at a time, and finishes the folder.

    Raises:
      DataFileError: `out` exists, the partial folder is another job's, or the disk is full.
    """
    ways = sharding.batch_ways(mesh)
    rows = -(-rows // ways) * ways
    encode = sources.make_encoder(text, mesh)
    missing = job.begin()
    total = len(job.lengths)
    done = total - sum(last - first for _, first, last in missing)
    try:
        with tqdm(total=total, initial=done, desc='embed', unit='prompt', file=sys.stderr) as bar:
            for name, first, last in missing:
                texts = stored.__getitems__(list(range(first, last)))
                parts: list[Any] = [None] * len(texts)
                for at, found in _encoded(texts, job.lengths[first:last], text, encode, rows):
                    parts[at] = found
                    bar.update()
                job.write_shard(name, texts, parts)
        job.finish(null)
    except OSError as e:
        raise DataFileError(f'{job.partial} cannot be written ({e.strerror}); make room and run '
                            'the same command again: what is finished is kept') from e


def _encoded(texts: list[str], lengths: np.ndarray, text: TextEncoder,
             encode: Callable[[Any], Any], rows: int) -> Iterator[tuple[int, Any]]:
    """(place, arrays) of every text; alike lengths go together, results one batch late."""
    order, pending = np.argsort(lengths, kind='stable'), None
    for start in range(0, len(order), rows):
        at = order[start:start + rows]
        filled = np.resize(at, rows)  # the last batch again has the shape of the others
        tokens = text.tokenize([texts[i] for i in filled])
        if text.cuts:
            longest = min(text.length, -(-int(lengths[at].max()) // STEP) * STEP)
            tokens = {k: x[:, :longest] for k, x in tokens.items()}
        this = at, encode(tokens)
        if pending:  # while the device works on this one
            yield from _fetched(*pending)
        pending = this
    if pending:
        yield from _fetched(*pending)


def _fetched(at: np.ndarray, cond: Any) -> Iterator[tuple[int, Any]]:
    found = embeddings.trimmed(jax.device_get(cond))
    yield from zip(at.tolist(), found)


def embed(stored: PromptSet, text: TextEncoder, mesh: Mesh, out: Path, rows: int,
          agreed: Callable[[str], bool]) -> tuple[embeddings.Job, bool]:
    """Writes `out` from a set of prompts, after asking whether the disk may be used so.

    `agreed(words)` is asked once, with what will be written and what is free. Returns what was
    written, and whether it was there already.

    Raises:
      DataFileError: no room, `out` is something else, or the answer is no.
    """
    job, null = plan(stored, text, out)
    if out.exists():
        if embeddings.Embeddings(out).card['identity'] != job.settings['identity']:
            raise DataFileError(f'{out} holds other embeddings; choose another --out or delete it')
        return job, True
    need, free = embeddings.room_for(job)
    words = (f'{len(job.lengths)} prompts of {job.lengths.mean():.0f} tokens on average: '
             f'{in_units(need)} to write to {out}, {in_units(free)} free')
    if need > free:
        raise DataFileError(f'{words}: there is no room; choose another --out, or train online '
                            "(config.data.name='prompts')")
    if not agreed(words):
        raise DataFileError(f'{words}: not agreed to, nothing written; --yes agrees beforehand')
    write(job, null, stored, text, mesh, rows)
    return job, False
