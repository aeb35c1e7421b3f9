"""Where a distillation's conditioning comes from, and how it reaches the devices.

Four sources, one interface (`conditioning.Prompts`): a data set that comes with the teacher's
family; embeddings that were written beforehand (cached); prompts whose tokens go through the text
encoder on the mesh, a jitted program of its own, as batches are needed (online); and captions of
real images, online likewise, with the images' latents, which were written beforehand.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ddmd_jax import families as teachers
from ddmd_jax.data import DataFileError, conditioning
from ddmd_jax.data.batch import Batch, Cond
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.data.images.cache import ImageCache
from ddmd_jax.data.prompts import build as prompt_sets
from ddmd_jax.families import Teacher, TextEncoder
from ddmd_jax.parallel import sharding
from ddmd_jax.train.durable import checkpoint as ckpt
from ddmd_jax.util import places

CHUNK = 4096  # texts tokenised at a time
TEXT_ROWS = 8  # prompts of images encoded at a time


def load(config: Any, teacher: Teacher, mesh: Mesh) -> Prompts:
    """The prompts that `config.data` names, as the teacher is conditioned on them.

    Raises:
      DataFileError: they are missing, damaged, or do not fit `data.lengths`.
      WeightsError: the text encoder cannot be read.
    """
    family = teachers.get(config.teacher.name)
    if config.data.name in family.data_sets:
        return family.data_sets[config.data.name].load(config, teacher, mesh)
    if config.data.name == 'embeddings':
        own = teacher.text.identity if teacher.text else None
        named = (config.teacher.path, *family.of_variant(config.teacher.variant))
        encoder = family.text_identity(*named) if family.text_identity else own
        found = conditioning.open_embeddings(config.data.path, teacher.cond.width, encoder)
    elif config.data.name == 'images':
        found = of_images(config, teacher, mesh)
    else:
        found = online(config.data.path, text_of(config, teacher, mesh), mesh,
                       bool(config.data.lengths))
    conditioning.check_buckets(config.data.get('lengths', ()), found)
    return dataclasses.replace(found, of_shape=teacher.cond.of_shape)


def of_images(config: Any, teacher: Teacher, mesh: Mesh) -> Prompts:
    """Captions and latents of the folder that `prepare images` wrote.

    Raises:
      DataFileError: missing or damaged, its latents are of another codec than the teacher's, or of
        other sizes than the config's.
    """
    path = config.data.path
    stored = ImageCache(places.of(path))
    if teacher.latents.encoder not in (None, stored.codec):
        raise DataFileError(f"{path} holds latents of another codec ({stored.codec}) than the "
                            f"teacher's ({teacher.latents.encoder}); write them again with "
                            "`python -m ddmd_jax.prepare images` and the teacher's folder")
    of_size = teacher.latents.shape_of
    asked = {tuple(of_size(size)) for size in config.data.sizes} if of_size else set()
    if (asked or {tuple(teacher.latents.shape)}) != set(stored.shapes):
        sizes = tuple(map(tuple, stored.card['settings']['sizes']))
        raise DataFileError(f'{path} holds latents of images of {sizes} pixels (height, width), '
                            'and the run asks for others; set config.data.sizes to these, first '
                            'the one that pictures shall have')
    found = as_needed(stored, text_of(config, teacher, mesh), mesh)
    return dataclasses.replace(found, real=stored.latents, shapes=stored.shapes,
                               shape_of=stored.buckets)


def online(path: str, text: TextEncoder, mesh: Mesh, measure: bool = False) -> Prompts:
    """`as_needed` of the prompt set at `path`.

    Raises:
      DataFileError: there is no prompt set at `path`, or it is damaged.
    """
    return as_needed(prompt_sets.open_set(path), text, mesh, measure)


def as_needed(stored: Any, text: TextEncoder, mesh: Mesh, measure: bool = False) -> Prompts:
    """The texts of `stored`, encoded on `mesh` when a batch needs them.

    Floats of the `Cond` are bfloat16, as those that `prepare embed` writes. `measure` counts
    every prompt's tokens beforehand, for length buckets.

    Args:
      stored: a sequence with an `identity`, and `__getitems__` of rows: `PromptSet`, `ImageCache`.

    Raises:
      DataFileError: it is empty.
    """
    if not len(stored):
        raise DataFileError(f'the set of prompts {stored.identity} has none to train on; prepare '
                            'it of more files, or with another --validation')
    encode, whole = make_encoder(text, mesh), make_encoder(text, mesh, whole=True)
    alone = lambda tokens: jax.tree.map(np.asarray, whole(tokens))
    texts = lambda rows: stored.__getitems__([int(row) for row in rows])

    def lookup(rows: np.ndarray, length: int | None) -> dict[str, np.ndarray]:
        tokens = text.tokenize(texts(rows))
        return {name: x[:, :length] for name, x in tokens.items()}

    return Prompts(
        np.arange(len(stored)), lookup, lambda rows: alone(lookup(rows, None)),
        alone(text.tokenize([''])), lambda row: stored[int(row)], stored.identity,
        token_counts(text, stored) if measure else None, encode, encoder=text.identity)


def token_counts(text: TextEncoder, stored: Any) -> np.ndarray:
    """True lengths ``[N]`` int32 of every prompt of a set."""
    return np.concatenate([text.tokenize(part)['mask'].sum(1)
                           for part in chunks(stored)]).astype(np.int32)


def chunks(stored: Any) -> Iterator[list[str]]:
    """The texts of a set, `CHUNK` at a time."""
    for i in range(0, len(stored), CHUNK):
        yield stored.__getitems__(list(range(i, min(i + CHUNK, len(stored)))))


def count_cut(text: TextEncoder, parts: Iterable[Sequence[str]]) -> int | None:
    """How many prompts lose their end at the encoder's limit; a warning says so, once.

    Another says how many have words that it does not know. None where the encoder does not tell.
    """
    if text.cut is None:
        return None
    tests = {f'are longer than the {text.length} tokens that {text.name} reads, and lose their end':
             text.cut}
    if text.unknown:
        tests[f'have words that {text.name} never learnt'] = text.unknown
    total, counts, first = 0, dict.fromkeys(tests, 0), dict[str, str]()
    for part in parts:
        total += len(part)
        for words, test in tests.items():
            bad = test(part)
            counts[words] += int(bad.sum())
            first |= {words: part[int(bad.argmax())]} if bad.any() and words not in first else {}
    for words, prompt in first.items():
        ckpt.warn(f'{counts[words]} of {total} prompts {words}; the first begins {prompt[:40]!r}')
    return next(iter(counts.values()))


def make_encoder(text: TextEncoder, mesh: Mesh, whole: bool = False) -> Callable[[Any], Cond]:
    """``tokens [B, L] -> Cond`` by `encoder_program`, its parameters put where they belong."""
    run, layout = encoder_program(text, mesh, whole)
    params = jax.device_put(text.params, layout)
    return lambda tokens: run(params, tokens)


def encode_texts(texts: Sequence[str], text: TextEncoder, mesh: Mesh) -> Cond:
    """Conditioning ``[n, ...]`` of texts that name images, in the host's memory.

    Always `TEXT_ROWS` rows at a time, so that no prompt's depends on the others: `sample` and a
    run's end condition one prompt alike. Process 0 shows a progress bar.
    """
    run, found = make_encoder(text, mesh, whole=True), None
    filled = [*texts, *[''] * (-len(texts) % TEXT_ROWS)]
    for i in tqdm(range(0, len(filled), TEXT_ROWS), 'encoding prompts', unit=' batches',
                  file=sys.stderr, disable=jax.process_index() != 0, dynamic_ncols=True):
        part = run(text.tokenize(filled[i:i + TEXT_ROWS]))
        if found is None:  # whole from the start: it can be most of the memory there is
            found = jax.tree.map(lambda x: np.empty((len(filled), *x.shape[1:]), x.dtype), part)
        for name, x in part.items():
            found[name][i:i + TEXT_ROWS] = x
    return jax.tree.map(lambda x: x[:len(texts)], found)


def image_encoder(config: Any, teacher: Teacher,
                  mesh: Mesh) -> Callable[[Sequence[str]], Cond]:
    """`encode_texts` by the teacher's text side, which is held no longer than a call."""
    return lambda texts: encode_texts(texts, text_of(config, teacher, mesh), mesh)


def text_of(config: Any, teacher: Teacher, mesh: Mesh) -> TextEncoder:
    """The teacher's text side: its own, or the one that its family loads apart.

    Raises:
      WeightsError: it cannot be read.
    """
    return teacher.text or teachers.get(config.teacher.name).load_text(teachers.LoadOptions(
        config.teacher.path, mesh, config.teacher.dtype, variant=config.teacher.variant))


def encoder_program(text: TextEncoder, mesh: Mesh, whole: bool = False) -> tuple[Any, Any]:
    """(jitted ``(params, tokens [B, L]) -> Cond``, layout of the parameters).

    The batch stays split over `mesh`; with `whole`, every device has all of the result, and any
    number of rows will do.
    """
    out = sharding.replicated(mesh) if whole else sharding.batch_sharding(mesh)
    run = jax.jit(lambda params, tokens: in_bf16(text.apply(params, tokens)), out_shardings=out)
    return run, sharding.shard_tree(text.params, text.rules, mesh)


def in_bf16(cond: Cond) -> Cond:
    """Floats in the type that conditioning is stored and handed on in."""
    half = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(half, cond)


def placer(prompts: Prompts, mesh: Mesh, rows: int) -> Callable[[Batch], Batch]:
    """``this process's rows -> a batch of `rows` on the devices``, encoded; waits for nothing."""
    def place(batch: Batch) -> Batch:
        batch = sharding.put_batch(batch, mesh, rows)
        if prompts.encode is None:
            return batch
        return dataclasses.replace(batch, cond=prompts.encode(batch.cond))

    return place
