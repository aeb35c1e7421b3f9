"""The embedded teacher by steps and guidance: what is right, how far from real images, how diverse.

    python benchmarks/teacher.py [--path=teacher.safetensors] [--prompts=384] [--held_out=192]

One line a sampler, beside real images and real images through the codec; docs/metrics.md says
what the columns are. `--json=FILE` keeps the figures.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from ddmd_jax.data.batch import null_like
from ddmd_jax.diffusion import drawing
from ddmd_jax.families.base import LoadOptions
from ddmd_jax.families.emoji import codec, suite, teacher as emoji

SAMPLERS = ((50, 1.0), (50, 2.0), (50, 3.0), (50, 4.0), (4, 1.0), (4, 2.0), (4, 3.0), (2, 1.0),
            (1, 1.0))
COLUMNS = ('all_match', 'all_match_held_out', 'objects_match', 'layout_match', 'size_match',
           'colour_match', 'frechet', 'colour_error', 'std', 'diversity')


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    flags.add_argument('--path', default='')
    flags.add_argument('--prompts', type=int, default=384)
    flags.add_argument('--held_out', type=int, default=192)
    flags.add_argument('--seed', type=int, default=0)
    flags.add_argument('--batch', type=int, default=96)
    flags.add_argument('--samplers', default='', help='STEPS:GUIDANCE, separated by commas')
    flags.add_argument('--json', type=Path)
    flags.add_argument('--sheet', type=Path, help='a picture: a caption a row, a sampler a column')
    args = flags.parse_args()
    samplers = [(int(s), float(w)) for s, w in (x.split(':') for x in args.samplers.split(',') if x)
                ] or SAMPLERS

    teacher = emoji.load(LoadOptions(args.path))
    examples = suite.examples(args.prompts, args.held_out, args.seed)
    rows, pictures = [], [examples.real]

    def line(name: str, images: np.ndarray, seconds: float = 0.0) -> None:
        rows.append({'name': name, 'seconds': round(seconds, 1), **examples.measure(images)})
        figures = '  '.join(f'{rows[-1][c]:.3f}' for c in COLUMNS)
        print(f'{name:22s}{figures}  {seconds:.0f} s', flush=True)

    print(f'{"":22s}{"  ".join(c.replace("_match", "")[:8] for c in COLUMNS)}')
    line('real', examples.real)
    encoded = np.asarray(codec.load().encode(np.round(examples.real * 127.5 + 127.5)))
    line('real through codec', np.asarray(teacher.latents.decode(encoded)))
    cond, null = teacher.encode(examples.captions), teacher.encode([''])
    for steps, guidance in samplers:
        sampler = drawing.of_teacher(teacher, steps, guidance)
        draw, started = jax.jit(sampler.draw), time.monotonic()
        parts = []
        for i in range(0, len(examples.captions), args.batch):
            part = jax.tree.map(lambda x, i=i: x[i:i + args.batch], cond)
            key = jax.random.fold_in(jax.random.key(args.seed), i)
            parts.append(np.asarray(sampler.decode(
                draw(teacher.params, part, null_like(null, part), key))))
        pictures.append(np.concatenate(parts))
        line(f'{steps} steps, w = {guidance:g}', pictures[-1], time.monotonic() - started)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + '\n')
    if args.sheet:
        from ddmd_jax.evaluation.pictures import captioned_sheet
        shown = [*range(0, 16, 4), *range(args.prompts - 4, args.prompts),
                 *range(args.prompts, args.prompts + 8, 4)]
        captioned_sheet([examples.captions[i] for i in shown],
                        ['real', *(f'{s} steps\nw={w:g}' for s, w in samplers)],
                        [x[shown] for x in pictures], args.sheet)


if __name__ == '__main__':
    main()
