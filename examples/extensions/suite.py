"""A metric suite: whether the rectangle has the colour that its caption asks for."""

from __future__ import annotations

import numpy as np
from own_teacher import shapes

from ddmd_jax.evaluation.suites import Examples, Suite


def examples(seen: int, held_out: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    captions = [shapes.CAPTIONS[i] for i in rng.permutation(
        np.resize(np.arange(len(shapes.CAPTIONS)), seen + held_out))]
    palette = np.asarray(list(shapes.COLOURS.values()), np.float32)
    names = list(shapes.COLOURS)

    def measure(images: np.ndarray) -> dict[str, float]:
        drawn = [image[shapes.PLACES[caption.split()[1]]].mean((0, 1))
                 for caption, image in zip(captions, images)]
        nearest = np.argmin(np.square(np.asarray(drawn)[:, None] - palette).sum(-1), axis=1)
        right = [names[i] == caption.split()[0] for i, caption in zip(nearest, captions)]
        return {'colour_match': float(np.mean(right))}

    return Examples(captions, measure, real=np.stack([shapes.draw(c) for c in captions]))


SUITE = Suite('rectangles', {'colour_match': '.2f'}, examples)
