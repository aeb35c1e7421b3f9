"""docs/config.md, the reference of every field, from the table: ``python docs/make_config.py``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddmd_jax import families
from ddmd_jax.config import fields
from ddmd_jax.config.fields import REQUIRED, Field, under
from ddmd_jax.method import regularisers

OUT = Path(__file__).with_name('config.md')
HEAD = """# Every field of a config

<!-- Written by `python docs/make_config.py`; edit ddmd_jax/config/fields.py. -->

`--config=NAME` takes a file, or the name of one of `configs/` (`emoji`, `lumina`, ...), and
`--config=NAME:SCHEDULE` sets `method.schedule`. Any field can be given as
`--config.section.field=value` (tuples in quotes: `--config.method.tau_ca='(0.0, 0.9)'`).
A config has to give the fields that are *required*, and `ddmd_jax.config.defaults(task, changes)`
adds all others. The fields of your own regulariser or data set are there once the file names it,
and not if a flag does. Fields that *may change* may differ when a run is resumed
([resuming.md](resuming.md)); any other makes it another experiment, and is refused."""

LINE = '| {} | {} | {} | {} | {} |'


def _value(value: Any) -> str:
    return 'required' if value is REQUIRED else f'`{value!r}`'.replace('|', r'\|')


def table(listed: Iterable[Field]) -> str:
    """A Markdown table, a line a field."""
    rows = [LINE.format('field', 'default', 'allowed', 'may change', 'meaning'),
            LINE.format(*['---'] * 5)]
    rows += [LINE.format(f'`{f.path}`', _value(f.default), f.rule.allowed,
                         'yes' if f.may_change else '', f.doc) for f in listed]
    return '\n'.join(rows)


def page() -> str:
    """The page, whole."""
    critic = [f.path for f in under('optim.critic', fields.OPTIMISER)]
    distill = [f for f in fields.DISTILL if f.path not in critic]
    parts = [HEAD, '## All tasks', table(fields.COMMON),
             'In a distillation the critic has an optimiser of its own, `optim.critic.*`, with the '
             'same fields and defaults. It counts its own updates: '
             '`train.steps * critic.updates + critic.warmup`.',
             '## Task `distill`', table(distill)]
    for name in regularisers.BUILT_IN:
        own = under(f'method.{name}', regularisers.get(name).fields)
        parts += [f'### Regulariser `{name}`', table(own)]
    parts += ['## Task `pretrain`', table(fields.PRETRAIN),
              'The architecture, `teacher.model.denoiser.*` and `teacher.model.text.*`, has the '
              'fields of `NextDiTConfig` and `CaptionEncoderConfig`.',
              '## Task `codec`', table(fields.CODEC),
              '## Data sets', '`prompts` and `embeddings`, of any family:',
              table(under('data', fields.PROMPTS)),
              '`images`, of any family whose codec makes latents of images:',
              table(under('data', fields.IMAGES))]
    for family in map(families.get, families.NAMES):
        for name, data in family.data_sets.items():
            parts += [f'`{name}`, of the family {family.name}:', table(under('data', data.fields))]
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    OUT.write_text(page())
