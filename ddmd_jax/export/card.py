"""The model card: what the student is, how to draw with it, what it was trained on, figures."""

import json
import os
from pathlib import Path

import jinja2

import ddmd_jax
from ddmd_jax.data.prompts import set as prompt_set
from ddmd_jax.export.student import Student
from ddmd_jax.families.family import Exported
from ddmd_jax.method import health
from ddmd_jax.util import files, jsonl, places, text

NAMES = README, PICTURE = 'README.md', 'samples.png'
# Fields of the config that say how a student was trained; no places on its machine.
SHOWN = ('student.', 'critic.', 'method.', 'optim.', 'data.global_batch', 'seed')
ORBAX = """import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore('{folder}/params')  # an absolute path
"""


def write(student: Student, out: Path, form: str, exported: Exported, weights: str) -> None:
    """``README.md``, and the picture of the run that it shows; `weights` names what was trained."""
    evaluation, why = _figures(student, exported, weights)
    if picture := not why and (student.workdir / PICTURE).is_file():
        (out / PICTURE).write_bytes((student.workdir / PICTURE).read_bytes())
    whole = (out / 'model_index.json').is_file()
    use = {'orbax': ORBAX, 'lora': student.export.use_adapters}.get(
        form, student.export.use if whole else student.export.alone)
    config = out / 'scheduler' / 'scheduler_config.json'
    scheduler = json.loads(config.read_text())['_class_name'] if config.is_file() else ''
    # The teacher as the hub knows it, or ''.
    base = student.manifest.get('teacher.path', '')
    if (base.count('/') != 1 or base.startswith(('.', '/', '~', '$'))
            or base.endswith('.safetensors') or os.path.exists(places.filled(base))):
        base = ''
    prompts = None  # the card of the run's set, if it is where it was; embeddings have another
    named = student.field('data.path') if student.field('data.name') == 'prompts' else ''
    if named and not places.fault(named):  # a variable of the run's machine may not be set here
        folder = places.of(named)
        prompts = prompt_set.read_card(folder) if (folder / prompt_set.CARD).is_file() else None
    history = jsonl.read(student.workdir / 'metrics.jsonl') or [{}]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
                                     trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name('card.md.jinja').read_text())
    card = template.render(
        student=student, dtype=exported.dtype, sampler=exported.sampler, picture=picture,
        version=ddmd_jax.__version__, base=base,
        library='diffusers' if whole or form == 'lora' else 'ddmd_jax',
        relation='adapter' if form == 'lora' else 'finetune',
        use=use.format(folder=out.name, dtype=exported.dtype, steps=student.steps,
                       base=base or 'TEACHER', scheduler=scheduler).strip(),
        evaluation=evaluation, why=why, before=health.before(history),
        health=history[-1] if 'health' in history[-1] else None,
        settings=[item for item in sorted(student.manifest.items()) if item[0].startswith(SHOWN)],
        prompts=prompts)
    files.write(out / README, card.rstrip('\n') + '\n')


def _figures(student: Student, exported: Exported, weights: str) -> tuple[str, str]:
    """(``eval.json``'s table, why the run has judged something else than is exported, or '')."""
    found = student.file('eval.json')
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
