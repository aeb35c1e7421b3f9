"""A set of prompts through a teacher's text encoder, into a folder to train from.

The folder's format is `data/embeddings.py`'s. The online mode gives the step the same bits, up to
how XLA fuses a batch of another size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
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
from ddmd_jax.util import places
from ddmd_jax.util.places import Place
from ddmd_jax.util.text import in_units

CHUNK = 1024  # prompts that are sorted by length and held by the host together
STEP = 32  # batches are cut to multiples of so many tokens: few programs, little padding


def embed(stored: PromptSet, text: TextEncoder, mesh: Mesh, out: Place,
          rows: int) -> tuple[str, bool]:
    """Encodes a set of prompts into the folder `out`, `rows` at a time.

    Returns the identity of what is written, and whether it was there already.

    Raises:
      DataFileError: no prompts, no room, a full disk, or `out` is something else.
    """
    if not len(stored):
        raise DataFileError(f'the set has no prompts of the split {stored.split}; name another '
                            '--split, or prepare it with another --validation')
    lengths = sources.token_counts(text, stored)
    (null,) = embeddings.trimmed(jax.device_get(
        sources.in_bf16(jax.jit(text.apply)(text.params, text.tokenize([''])))))
    settings = {
        'encoder': text.name, 'encoder_identity': text.identity, 'prompts': stored.identity,
        'split': stored.split, 'width': text.width,
        'length': int(max(lengths.max(), len(null['embeds']))),
        'dtype': embeddings.FLOAT.__name__}
    settings['identity'] = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if out.exists():
        if embeddings.Embeddings(out).card['identity'] != settings['identity']:
            raise DataFileError(f'{out} holds other embeddings; choose another --out or delete it')
        return settings['identity'], True

    settings['cut'] = sources.count_cut(text, sources.chunks(stored))  # prompts
    need = int(lengths.sum()) * text.width * np.dtype(embeddings.FLOAT).itemsize
    made = Path(tempfile.gettempdir()) if places.is_url(out) else out  # what goes to a bucket
    free = shutil.disk_usage(next(p for p in (made, *made.parents) if p.exists())).free
    words = (f'{len(lengths)} prompts of {lengths.mean():.0f} tokens on average: '
             f'{in_units(need)} to write to {out}, {in_units(free)} free')
    if need > free:
        raise DataFileError(f'{words}: there is no room; choose another --out, or train online '
                            "(config.data.name='prompts')")
    print(words, file=sys.stderr)

    ways = sharding.batch_ways(mesh)
    encode = sources.make_encoder(text, mesh)

    def encoded() -> Iterator[tuple[str, Any]]:
        for start in range(0, len(stored), CHUNK):
            texts = stored.__getitems__(range(start, min(start + CHUNK, len(stored))))
            found: dict[int, Any] = {}
            for at, cond in _encoded(texts, lengths[start:], text, encode, -(-rows // ways) * ways):
                found.update(zip(at, embeddings.trimmed(jax.device_get(cond))))
                bar.update(len(at))
            yield from ((one, found[i]) for i, one in enumerate(texts))

    try:
        with tqdm(total=len(stored), desc='embed', unit='prompt', file=sys.stderr) as bar:
            embeddings.write(out, settings, null, encoded())
    except OSError as e:
        raise DataFileError(f'{out} cannot be written ({e.strerror or e}); make room and run the '
                            'same command again') from e
    return settings['identity'], False


def _encoded(texts: list[str], lengths: np.ndarray, text: TextEncoder,
             encode: Callable[[Any], Any], rows: int) -> Iterator[tuple[list[int], Any]]:
    """(places, their `Cond` and rows of padding); alike lengths go together.

    One batch late: the device works on the next while the caller fetches one.
    """
    order, last = np.argsort(lengths[:len(texts)], kind='stable'), None
    for start in range(0, len(order), rows):
        at = order[start:start + rows]
        tokens = text.tokenize([texts[i] for i in np.resize(at, rows)])  # always of one shape
        if text.cuts:
            longest = min(text.length, -(-int(lengths[at].max()) // STEP) * STEP)
            tokens = {k: x[:, :longest] for k, x in tokens.items()}
        this = at.tolist(), encode(tokens)
        if last:
            yield last
        last = this
    if last:
        yield last
