"""A suite: prompts, the measures of the images drawn of them, and the columns of its table.

A family names the suite of its runs; `eval.suite` names another, at a dotted path in any module::

    # my_module.py, run with --config.eval.suite=my_module.SUITE
    def examples(seen, held_out, seed):
        brightness = lambda images: {'brightness': float(images.mean())}
        return Examples(['a red apple'] * (seen + held_out), brightness)

    SUITE = Suite('brightness', {'brightness': '.3f'}, examples)
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ddmd_jax.data import DataFileError


@dataclasses.dataclass(frozen=True)
class Examples:
    """n prompts, and what is measured of the images drawn of them.

    Attributes:
      captions: the prompts; one that comes twice is drawn with two noises.
      measure: ``images [n, H, W, 3] in [-1, 1], in the order of captions -> {figure: value}``;
        None is a figure that these prompts do not have.
      held_out: ``[n]`` bool, the prompts that no training has seen; None where that is not known.
      real: ``[n, H, W, 3]`` real images of the prompts, the first row of the table; or None.
    """

    captions: Sequence[str]
    measure: Callable[[np.ndarray], Mapping[str, float | None]]
    held_out: np.ndarray | None = None
    real: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Where an evaluation is described.

    Attributes:
      name: for messages.
      columns: the figures of the table in their order, with the format of each: ``{'fid': '.2f'}``.
      examples: ``(seen, held_out, seed) -> Examples`` of `eval.prompts` prompts that training may
        have seen and `eval.held_out` that it has not; a suite without such a split takes the sum.
      watched: likewise of the prompts that `log.judge` draws at every logged interval; its figures
        go into ``metrics.jsonl`` under their names. None watches nothing.
    """

    name: str
    columns: Mapping[str, str]
    examples: Callable[[int, int, int], Examples]
    watched: Callable[[int, int, int], Examples] | None = None


def find(path: str) -> Suite:
    """The suite at a dotted path, ``my_module.SUITE``.

    Raises:
      DataFileError: there is no such module, or what it has under that name is no suite.
    """
    module, _, name = path.rpartition('.')
    try:
        suite = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise DataFileError(f'eval.suite={path} cannot be imported ({e}); name a suite as '
                            'my_module.SUITE, its module on PYTHONPATH') from e
    if not isinstance(suite, Suite):
        raise DataFileError(f'eval.suite={path} is of type {type(suite).__name__}, not '
                            'ddmd_jax.evaluation.suites.Suite')
    return suite
