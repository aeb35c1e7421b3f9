"""Suites for tests of evaluations: of a family's kind, with cheap figures; and small benchmarks."""

import dataclasses

import numpy as np

from ddmd_jax.evaluation.suites import SUITES, Examples, Suite

CAPTIONS = ['a red apple', 'a car', 'a red apple', 'a fox on a purple background', 'a cat']


def examples(seen, held_out, seed):
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(seen + held_out)]
    each = lambda images, rows: {'brightness': images.mean((1, 2, 3), np.float64),
                                 'pixels': images.reshape(len(rows), -1)}
    figures = lambda of: {'brightness': float(of['brightness'].mean()),
                          'contrast': float(of['pixels'].std(0, np.float64).mean())}
    measure = lambda images: figures(each(images, np.arange(len(images))))
    return Examples(captions, measure, np.arange(len(captions)) >= seen, None, each, figures)


TOY = Suite('toy', {'brightness': '.4f', 'contrast': '.4f'}, examples)
SMALL = dataclasses.replace(SUITES['geneval'], name='small', counts={'': 3}, images=2)
GROUPS = dataclasses.replace(SUITES['t2i_compbench'], name='groups', images=1, columns={
    't2i/color': '.4f', 't2i/shape': '.4f'}, counts={'color': 1, 'shape': 1})
SCORED = dataclasses.replace(SMALL, name='scored', columns={'hps_v2.1': '.2f'},
                             metrics=('hps_v2.1',), results=None)
