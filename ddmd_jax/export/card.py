"""The model card: what the student is, how to draw with it, what it was trained on, figures."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jinja2

import ddmd_jax
from ddmd_jax.data.prompts import set as prompt_set
from ddmd_jax.export.student import Student
from ddmd_jax.families.family import Exported
from ddmd_jax.method import health
from ddmd_jax.util import files, places, shape, text

NAMES = README, PICTURE = 'README.md', 'samples.png'
# Fields of the config that say how a student was trained; no places on its machine.
SHOWN = ('student.', 'critic.', 'method.', 'optim.', 'data.global_batch', 'seed')
ORBAX = """import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore('{folder}/params')  # an absolute path
"""


@dataclasses.dataclass(frozen=True)
class Told:
    """What the run and its data say: `evaluation` is ``eval.json``, `history` the logged lines,
    `prompts` the card of its set, if that is where it was (embeddings have another)."""

    evaluation: dict[str, Any] | None
    history: list[dict[str, Any]]
    prompts: dict[str, Any] | None


def read(student: Student) -> Told:
    """Read before anything is written: a file that is damaged leaves no half export.

    Raises:
      UserError: a file of the run, or its set's card, is damaged.
    """
    named = student.field('data.path') if student.field('data.name') == 'prompts' else ''
    prompts = None
    if named and not places.fault(named):  # a variable of the run's machine may not be set here
        folder = places.of(named)
        prompts = prompt_set.read_card(folder) if (folder / prompt_set.CARD).is_file() else None
        if prompts and student.manifest.get('data_identity', prompts['identity']) != (
                prompts['identity']):
            prompts = None  # another set lies there now
    return Told(student.file('eval.json'), student.file('metrics.jsonl') or [{}], prompts)


def write(student: Student, out: Path, form: str, exported: Exported, weights: str,
          told: Told) -> None:
    """``README.md``, and the picture of the run that it shows; `weights` names what was trained."""
    evaluation, why = _figures(student, exported, weights, told.evaluation)
    if picture := not why and (student.workdir / PICTURE).is_file():
        (out / PICTURE).write_bytes((student.workdir / PICTURE).read_bytes())
    whole = (out / 'model_index.json').is_file()
    use = {'orbax': ORBAX, 'lora': student.export.use_adapters}.get(
        form, student.export.use if whole else student.export.alone)
    config = out / 'scheduler' / 'scheduler_config.json'
    scheduler = json.loads(config.read_bytes())['_class_name'] if config.is_file() else ''
    # The teacher as the hub knows it, or ''.
    base = student.manifest.get('teacher.path', '')
    if (base.count('/') != 1 or base.startswith(('.', '/', '~', '$'))
            or base.endswith('.safetensors') or os.path.exists(places.filled(base))):
        base = ''
    last, shown = told.history[-1], ('dm_rel_gap', 'x_std')
    judged = 'health' in last and not any(shape.fault(last.get(n), float) for n in shown)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
                                     trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name('card.md.jinja').read_text('utf-8'))
    card = template.render(
        student=student, dtype=exported.dtype, sampler=exported.sampler, picture=picture,
        version=ddmd_jax.__version__, base=base,
        library='diffusers' if whole or form == 'lora' else 'ddmd_jax',
        relation='adapter' if form == 'lora' else 'finetune',
        use=use.format(folder=out.name, dtype=exported.dtype, steps=student.steps,
                       base=base or 'TEACHER', scheduler=scheduler).strip(),
        evaluation=evaluation, why=why, before=health.before(told.history),
        health=last if judged else None,
        settings=[item for item in sorted(student.manifest.items()) if item[0].startswith(SHOWN)],
        prompts=told.prompts,
        inputs=[Path(one['input']).name for one in (told.prompts or {}).get('inputs', ())])
    files.write(out / README, card.rstrip('\n') + '\n')


def _figures(student: Student, exported: Exported, weights: str,
             found: dict[str, Any] | None) -> tuple[str, str]:
    """(``eval.json``'s table, why the run has judged something else than is exported, or '')."""
    judged = (found or {}).get('step', student.step)
    if not student.ema:
        return '', 'these are the raw weights, and the run judged their EMA'
    if exported.sampler != student.sampler:
        return '', f'the run judged what {student.sampler!r} draws'
    if judged != student.step:
        return '', f'the run judged its weights at step {judged}, these are of {student.step}'
    if not found:
        return '', 'the run was not evaluated'
    if found.get('weights', weights) != weights:
        return '', 'the run judged other weights of this step'
    heads = [name for name in found['rows'][0] if name != 'name']
    show = lambda v: '' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    return text.markdown(['', *(name.replace('_', ' ') for name in heads)],
                         [[row['name'], *(show(row[h]) for h in heads)]
                          for row in found['rows']]), ''
