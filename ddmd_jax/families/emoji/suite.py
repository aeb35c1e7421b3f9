"""The suite of the embedded world: pairs of glyph and background, measured by the classifier."""

import numpy as np

from ddmd_jax.evaluation import measures
from ddmd_jax.evaluation.suites import Examples, Suite
from ddmd_jax.families.emoji import data as emoji, judge as classifier

COLUMNS = dict.fromkeys(('glyph_match', 'glyph_match_held_out', 'background_match', 'frechet',
                         'colour_error', 'variance'), '.3f')


def evaluation_pairs(pairs: emoji.Pairs, seen: int, held_out: int, seed: int) -> np.ndarray:
    """Indices of `seen` training pairs, then `held_out` held-out ones, drawn evenly."""
    rng = np.random.default_rng(seed)
    def draw(mask: np.ndarray, n: int) -> np.ndarray:
        rows = np.flatnonzero(mask)
        return rng.permutation(np.resize(rng.permutation(rows), n))
    return np.concatenate([draw(~pairs.held_out, seen), draw(pairs.held_out, held_out)])


def examples(seen: int, held_out: int, seed: int) -> Examples:
    """The prompts and figures of ``eval.json``; docs/metrics.md defines them."""
    pairs, judge = emoji.load_pairs(), classifier.load()
    rows = evaluation_pairs(pairs, seen, held_out, seed)
    held, real, asked = pairs.held_out[rows], pairs.images(rows), _asked(pairs, rows)
    _, _, reference = classifier.judge_all(judge, real)
    scale = reference.std(axis=0)  # units in which every feature of real images varies by 1

    def measure(images: np.ndarray) -> dict[str, float]:
        glyph, colour, features = classifier.judge_all(judge, images)
        right = glyph == pairs.glyph[rows]
        return {
            'glyph_match': float(right[~held].mean()),
            'glyph_match_held_out': float(right[held].mean()),
            'background_match': float((colour == pairs.colour[rows]).mean()),
            'frechet': measures.frechet_distance(features / scale, reference / scale),
            'colour_error': measures.colour_error(images, asked),
            'variance': measures.image_variance(images),
        }

    return Examples([pairs.caption(i) for i in rows], measure, held, real)


def watched(seen: int, held_out: int, seed: int) -> Examples:
    """The prompts and figures of `log.judge`: of the EMA student, over all prompts."""
    pairs, judge = emoji.load_pairs(), classifier.load()
    rows = evaluation_pairs(pairs, seen, held_out, seed)
    asked = _asked(pairs, rows)

    def measure(images: np.ndarray) -> dict[str, float]:
        glyph, colour, _ = classifier.judge_all(judge, images, len(images))
        return {'ema_match': float((glyph == pairs.glyph[rows]).mean()),
                'ema_background': float((colour == pairs.colour[rows]).mean()),
                'ema_colour_error': measures.colour_error(images, asked),
                'ema_variance': measures.image_variance(images)}

    return Examples([pairs.caption(i) for i in rows], measure, pairs.held_out[rows])


def _asked(pairs: emoji.Pairs, rows: np.ndarray) -> np.ndarray:
    """Colour of the background that each prompt names, ``[n, 3]`` in 0-255."""
    return np.asarray(list(emoji.COLOURS.values()))[pairs.colour[rows]]


SUITE = Suite('emoji', COLUMNS, examples, watched)
