"""The suite of the embedded world: scenes seen and held out, read by the judge.

Of either half of its prompts every second image belongs to a caption that is drawn `IMAGES` times,
in a row: from these comes diversity.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from ddmd_jax.evaluation import measures
from ddmd_jax.evaluation.suites import BLOCK, Columns, Examples, Suite
from ddmd_jax.families.emoji import judge, scenes
from ddmd_jax.families.emoji.scenes import COLOURS, Scene, World

COLUMNS = dict.fromkeys(('all_match', 'all_match_held_out', 'frechet', 'colour_error', 'std',
                         'diversity'), '.3f')
IMAGES = 4  # of a caption that diversity is measured on
REFERENCES = 2560  # real images of the prompts that the drawn ones are compared with, at least
MOST = 32  # of them of one prompt


def prompts(world: World, seen: int, held_out: int, seed: int) -> list[Scene]:
    """`seen` scenes like those of training, then `held_out` held-out ones.

    Each half begins with its scenes that come `IMAGES` times, one after another; in these the
    backgrounds take turns.
    """
    rng = np.random.default_rng((seed, 16))

    def of_colour(colour: int, held: bool) -> Scene:
        while (scene := world.scene(rng, held)).colour != colour:
            pass
        return scene

    def draw(n: int, held: bool) -> list[Scene]:
        several = n // (2 * IMAGES) or int(n >= IMAGES)  # one at least, where there is room for it
        colours = itertools.cycle(rng.permutation(len(COLOURS)).tolist())
        repeated = [scene for scene in (of_colour(next(colours), held) for _ in range(several))
                    for _ in range(IMAGES)]
        return repeated + [world.scene(rng, held) for _ in range(n - len(repeated))]

    return draw(seen, False) + draw(held_out, True)


def examples(seen: int, held_out: int, seed: int) -> Examples:
    """The prompts and figures of ``eval.json``; docs/metrics.md defines them."""
    world = scenes.load()
    look = judge.load(world)
    asked = prompts(world, seen, held_out, seed)
    captions = [world.caption(scene) for scene in asked]
    held = np.arange(len(asked)) >= seen
    rng = np.random.default_rng((seed, 17))
    real = np.empty((len(asked), scenes.SIDE, scenes.SIDE, 3), np.float32)
    for start, block in zip(range(0, len(asked), BLOCK), _real(world, asked, rng)):
        real[start:start + BLOCK] = block
    # Real images again: the row `real` is compared with others of its own captions, as any row is.
    times = min(MOST, max(2, -(-REFERENCES // len(asked))))
    reference = _real(world, asked * times, rng)  # drawn as they are looked at
    features, grounds = (np.concatenate(x) for x in zip(*(
        (judge.read(look, x)[1], measures.background(x)) for x in reference)))
    scale = features.std(axis=0)  # units in which every feature of real images varies by 1
    features = features / scale
    colours = [scene.colour for scene in asked]
    backgrounds = measures.average_colours(grounds, colours * times)
    # Distances between real images of one caption, of the captions that are drawn several times.
    groups = np.asarray([captions.index(caption) for caption in captions])
    several = np.tile(np.bincount(groups)[groups] > 1, times)
    apart = measures.pairwise_distance(
        features[several], np.tile(groups, times)[several].tolist())

    def each(images: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        readings, drawn = judge.read(look, images)
        right = judge.matches(readings, [asked[row] for row in rows])
        return {**{f'{part}_match': found for part, found in right.items()},
                'std': np.std(images, axis=(1, 2, 3)), 'features': drawn / scale,
                'background': measures.background(images)}

    def figures(of: Columns) -> dict[str, float | None]:
        among = measures.pairwise_distance(of['features'], groups.tolist())
        found = {
            'all_match': _share(of['all_match'], ~held),
            'all_match_held_out': _share(of['all_match'], held),
            'frechet': measures.frechet_distance(of['features'], features),
            'colour_error': measures.average_colour_error(
                measures.average_colours(of['background'], colours), backgrounds),
            'std': float(np.mean(of['std'])),
            'diversity': among / apart if among is not None and apart else None,
        }
        for part in ('layout', 'objects', 'size', 'colour'):
            found[f'{part}_match'] = _share(of[f'{part}_match'], ~held)
            found[f'{part}_match_held_out'] = _share(of[f'{part}_match'], held)
        return found

    measure = lambda images: figures(each(images, np.arange(len(images))))
    return Examples(captions, measure, held, real, each, figures)


def watched(seen: int, held_out: int, seed: int) -> Examples:
    """The prompts and figures of `log.judge`: of the EMA student, over all prompts."""
    world = scenes.load()
    look = judge.load(world)
    asked = prompts(world, seen, held_out, seed)

    def measure(images: np.ndarray) -> dict[str, float]:
        readings, _ = judge.read(look, images, len(images))
        right = judge.matches(readings, asked)
        return {'ema_match': float(right['all'].mean()),
                'ema_objects': float(right['objects'].mean()),
                'ema_background': float(right['colour'].mean()),
                'ema_image_std': measures.per_sample_std(images)}

    return Examples([world.caption(scene) for scene in asked], measure,
                    np.arange(len(asked)) >= seen)


def _real(world: World, asked: list[Scene], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A real image of each scene, ``[<= BLOCK, 64, 64, 3]`` fp32 in [-1, 1], block by block."""
    for start in range(0, len(asked), BLOCK):
        yield judge.to_unit(np.stack([world.image(scene, rng)
                                      for scene in asked[start:start + BLOCK]]))


def _share(right: np.ndarray, among: np.ndarray) -> float | None:
    return float(right[among].mean()) if among.any() else None


SUITE = Suite('emoji', COLUMNS, examples, watched)
