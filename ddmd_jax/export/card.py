"""The model card: what the student is, how to draw with it, what it was trained on, figures."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

import ddmd_jax
from ddmd_jax.data.prompts import set as prompt_set
from ddmd_jax.export.student import Student
from ddmd_jax.families.family import Exported
from ddmd_jax.method import health as diagnostics
from ddmd_jax.util import jsonl as lines

TEMPLATE = Path(__file__).with_name('card.md.jinja')
README, PICTURE, CONFIG, METRICS = NAMES = (
    'README.md', 'samples.png', 'training_config.json', 'training_metrics.jsonl')
PLACES = ('resume', 'init_from', 'teacher.path', 'data.path')  # of the machine it was trained on
ORBAX = """import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore('{folder}/params')  # an absolute path
"""


def write(student: Student, out: Path, form: str, exported: Exported) -> None:
    """``README.md``, with what it points to: the picture, config and figures of the run."""
    dtype, sampler, family = exported.dtype, exported.sampler, student.export
    evaluation, why = _figures(student, sampler)
    copied = [(METRICS, 'metrics.jsonl')] + [(PICTURE, PICTURE)] * (not why)
    kept = [name for name, theirs in copied if _copied(student.workdir / theirs, out / name)]
    if config := student.file('config.json'):
        (out / CONFIG).write_text(json.dumps(_without_places(config), indent=1) + '\n')
        kept.append(CONFIG)
    whole = (out / 'model_index.json').is_file()
    use = ORBAX if form == 'orbax' else family.use if whole else family.alone
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
                                     trim_blocks=True)
    text = environment.from_string(TEMPLATE.read_text()).render(
        student=student, form=form, dtype=dtype, sampler=sampler, version=ddmd_jax.__version__,
        library='diffusers' if whole else 'ddmd_jax', base=_hub_name(student), kept=kept,
        use=use.format(folder=out.name, dtype=dtype, steps=student.steps).strip(),
        evaluation=_evaluation(evaluation), why=why, health=_health(student.workdir),
        settings=_settings(student.manifest), prompts=_prompts(student))
    (out / README).write_text(text.rstrip('\n') + '\n')


def _figures(student: Student, sampler: str) -> tuple[Any, str]:
    """(``eval.json`` or None, why what the run has judged is not what is exported, or '')."""
    found = student.file('eval.json')
    judged = (found or {}).get('config', {}).get('train', {}).get('steps', student.step)
    if not student.ema:
        return None, 'these are the raw weights, and the run judged their EMA'
    if sampler != student.sampler:
        return None, f'the run judged what {student.sampler!r} draws'
    if judged != student.step:
        return None, f'the run judged its weights at step {judged}, these are of {student.step}'
    return found, '' if found else 'the run was not evaluated'


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(config))
    for name in PLACES:
        *above, last = name.split('.')
        section = config
        for part in above:
            section = section.get(part, {})
        if last in section:
            section[last] = ''
    return config


def _copied(source: Path, target: Path) -> bool:
    if source.is_file():
        shutil.copyfile(source, target)
    return source.is_file()


def _hub_name(student: Student) -> str:
    """The teacher as the hub knows it, or ''."""
    path = student.manifest.get('teacher.path', '')
    named = path.count('/') == 1 and not path.startswith(('.', '/', '~'))
    return path if named and not path.endswith('.safetensors') and not Path(path).exists() else ''


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields of the run's config that say how it was trained; no places on its machine."""
    wanted = ('student.', 'critic.', 'method.', 'optim.', 'data.global_batch', 'seed')
    return [(name, value) for name, value in sorted(manifest.items()) if name.startswith(wanted)]


def _evaluation(found: Any) -> dict[str, Any] | None:
    """Heads and rows of ``eval.json``'s table."""
    if not found:
        return None
    heads = [name for name in found['rows'][0] if name != 'name']
    show = lambda v: '' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    return {'heads': heads, 'rows': [[row['name'], *(show(row[h]) for h in heads)]
                                     for row in found['rows']]}


def _health(workdir: Path) -> dict[str, Any] | None:
    """The last line of health figures, and what was `before`."""
    history = lines.read(workdir / 'metrics.jsonl') or [{}]
    last = history[-1] | {'before': diagnostics.before(history)}
    return last if 'health' in last else None


def _prompts(student: Student) -> dict[str, Any] | None:
    """The card of the run's set of prompts, if it is where it was; embeddings have another."""
    if student.field('data.name') != 'prompts':
        return None
    folder = Path(student.field('data.path')).expanduser()
    return prompt_set.read_card(folder) if (folder / prompt_set.CARD).is_file() else None
