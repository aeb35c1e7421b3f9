"""Every wrong field of a config is named, with its value and what is allowed, all at once."""

import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ddmd_jax import config as config_lib
from ddmd_jax.config import fields, load, rules
from ddmd_jax.diffusion import sampling
from ddmd_jax.method.inputs import TEACHER_PASSES
from ddmd_jax.method.losses import NORMALISERS, WEIGHTINGS
from ddmd_jax.method.regularisers import BUILT_IN
from ddmd_jax.method.schedules import SCHEDULES
from ddmd_jax.models import attention, layers
from ddmd_jax.train.distillation import OFFLOAD
from ddmd_jax.train.durable import guards, rollback
from ddmd_jax.train.durable.checkpoint import comparable, differences
from ddmd_jax.train.watch import trackers

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def changed(name, fields):
    """A shipped config with dotted `fields` replaced, whatever their type was."""
    config = load(name)
    with config.ignore_type(), config.unlocked():
        for path, value in fields.items():
            *sections, key = path.split('.')
            functools.reduce(lambda section, name: section[name], sections, config)[key] = value
    return config


def reference():
    return runpy.run_path(str(ROOT / 'docs/make_config.py'))['page']()


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_configs_are_valid_and_whole(name):
    config = load(name)
    config_lib.check(config)
    assert config.to_dict() == load(name).to_dict()


@pytest.mark.parametrize('name', SHIPPED)
def test_values_of_the_shipped_configs(name):
    """Golden: a default that changes would change every run that does not name it."""
    values = json.loads(json.dumps(load(name).to_dict()))
    golden = json.loads((ROOT / 'tests/golden/configs.json').read_text())[name]
    assert json.dumps(values, sort_keys=True) == json.dumps(golden, sort_keys=True)


@pytest.mark.parametrize('name', SHIPPED)
def test_a_flag_can_set_every_field_that_is_documented(name):
    """ml_collections refuses ``--config.x`` where the config has no x."""
    config = load(name)
    absent = {f.path for f in config_lib.fields_of(config) if f.default is not None
              and config_lib.field(config, f.path) is None}
    assert not [path for path in absent if not path.startswith('teacher.model.')]


def test_a_run_from_before_a_later_field_is_gone_on_with_at_its_default():
    config = load('emoji')
    said = comparable(config.to_dict())
    assert not {'critic.order', 'method.null', 'method.gan.head'} & set(said)
    config.critic.order = 'one_rollout'
    assert differences(said, comparable(config.to_dict())) == [
        "critic.order: absent -> 'one_rollout'"]


@pytest.mark.parametrize('name', ['emoji', 'lumina'])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_the_papers_schedules_are_valid(name, schedule):
    config = load(f'{name}:{schedule}')
    assert config.method.schedule == schedule and config_lib.validate(config) == []


@pytest.mark.parametrize('recipe', ['dmd2', 'decoupled_full', 'decoupled_constrained',
                                    'decoupled_hybrid', '1step'])
def test_the_recipes_of_sdxl_are_valid(recipe):
    """Of the paper's three nothing but the schedule differs, and how its terms are normalised."""
    config = load(f'sdxl:{recipe}')
    assert config_lib.validate(config) == []
    iterations = config.train.steps * config.critic.updates
    assert iterations == (24_000 if recipe == '1step' else 19_000)
    values, dmd2 = (config_lib.dotted(c) for c in (config, load('sdxl:dmd2')))
    changed_by = {name for name in values if values[name] != dmd2[name]}
    assert changed_by == {
        'dmd2': set(), '1step': {'student.steps', 'student.first_step', 'train.steps'}}.get(
            recipe, {'method.schedule', 'method.normaliser', 'method.floor'})


def test_no_recipe_of_that_name():
    with pytest.raises(ValueError, match="no recipe 'dmd3' of sdxl; known: dmd2, 1step"):
        load('sdxl:dmd3')


@pytest.mark.parametrize(('fields', 'words'), [
    ({'student.first_step': 1000}, 'must lie from student.steps - 1 = 3 to 999'),
    ({'student.first_step': 2}, 'must lie from student.steps - 1 = 3 to 999'),
    ({'critic.updates': 0, 'method.weight_dm': 0.0, 'method.gan.weight': 0.0},
     'needs critic.updates of at least 1'),
    # Steps 10, 7, 4 and 2 of the table: tau must be cleaner than the last, step 1 or 0.
    ({'student.first_step': 10, 'method.schedule': 'decoupled_hybrid',
      'method.tau_dm': (0.0, 0.999)}, 'must be above 0.998'),
    ({'student.first_step': 399, 'student.steps': 1, 'method.tau_ca': (0.0, 0.5),
      'method.schedule': 'decoupled_hybrid'}, 'must be above 0.601'),
    ({'data.name': 'embeddings'}, 'has no real images: the weight of method.gan')])
def test_one_wrong_field_of_sdxl(fields, words):
    (line,) = config_lib.validate(changed('sdxl', fields))
    assert words in line


DISTILL = [
    ('task', 'distil', "did you mean 'distill'?"),
    ('seed', -1, 'at least 0'),
    ('seed', 0.0, 'a whole number'),
    ('seed', True, 'a whole number'),
    ('teacher.name', 'emojy', "did you mean 'emoji'?"),
    ('teacher.path', None, 'a string'),
    ('teacher.dtype', 'bfloat61', "'float32' or 'bfloat16'; did you mean 'bfloat16'?"),
    ('teacher.remat', 'ful', "must be one of none, full, dots; did you mean 'full'?"),
    ('teacher.remat', None, 'must be one of none, full, dots'),  # the word, not the value
    ('teacher.attention', 'flash', 'must be one of auto, xla, splash, cudnn'),
    ('student.steps', 0, 'at least 1 and at most 64'),
    ('student.steps', 65, 'at most 64'),
    ('student.steps', 2.0, 'a whole number'),
    ('student.ema', 1.0, 'below 1'),
    ('student.ema_ramp', 1, 'True or False'),
    ('student.sampler', 'renoised', "did you mean 'renoise'?"),
    ('critic.updates', 0, 'at least 1 while method.weight_dm is above 0'),
    ('critic.updates', 0.5, 'a whole number at least 0'),
    ('critic.warmup', -1, 'at least 0'),
    ('critic.weighting', 'x', 'must be one of velocity, clean, noise'),
    ('critic.order', 'same', 'must be one of critic_first, same_images, one_rollout'),
    ('student.first_step', 399, 'must be None for emoji, whose time is no table of steps'),
    ('method.gan.head', 'convolution', "did you mean 'convolutions'?"),
    ('critic.tau', (0.0, 1.0), 'no noise left to normalise by'),
    ('method.schedule', 'decoupled_hybird', "did you mean 'decoupled_hybrid'?"),
    ('method.alpha', 1.0, 'alpha = 1 makes CA zero'),
    ('method.alpha', 0.5, 'the guidance scale, not alpha - 1'),
    ('method.alpha', float('nan'), 'must be a number'),
    ('method.alpha', '4', 'must be a number'),
    ('method.weight_ca', -1.0, 'at least 0'),
    ('method.tau_ca', (0.5, 0.5), '0 <= low < high <= 0.999'),
    ('method.tau_ca', (-0.1, 0.5), '0 <= low'),
    ('method.tau_ca', (0.0, 0.9995), 'no noise left'),
    ('method.tau_ca', 0.9, 'two numbers'),
    ('method.tau_ca', (0.0, 0.5, 0.9), 'two numbers'),
    ('method.tau_ca', (False, 0.9), 'two numbers'),
    ('method.tau_ca', (0.0, 0.75), 'must be above 0.75, where decoupled_hybrid draws this tau'),
    ('method.normaliser', 'per_tern', "did you mean 'per_term'?"),
    ('method.floor', 0.0, 'above 0'),
    ('method.shift', 0.0, "None or a number above 0: None takes the teacher's"),
    ('method.null', 'zeros', "must be 'encoded' with teacher.name 'emoji', which knows no other"),
    ('method.null', 'zero', "did you mean 'zeros'?"),
    ('data.name', 'laion', 'must be one of emoji, prompts, embeddings, images with teacher.name'),
    ('data.name', 'embedings', "did you mean 'embeddings'?"),
    ('data.global_batch', 30, 'steps not dividing; the next batch that does: 32'),
    ('data.global_batch', 0, 'at least 1'),
    ('data.scenes', 0, 'at least 1'),
    ('optim.student.name', 'adam', "did you mean 'adamw'?"),
    ('optim.critic.name', 'sgd', 'any other: give a chain'),
    ('optim.critic.lr', 0.0, 'above 0'),
    ('optim.student.b1', 1.0, 'at least 0 and below 1'),
    ('optim.student.b2', 0.0, 'above 0 and below 1'),
    ('optim.student.eps', 0.0, 'above 0'),
    ('optim.student.weight_decay', -0.1, 'at least 0'),
    ('optim.student.clip', -1.0, 'at least 0: 0 is off'),
    ('optim.student.warmup', 0.5, 'a whole number'),
    ('optim.student.decay', 1.5, 'at most 1'),
    ('optim.student.chain', 'sgd', 'a sequence of (name in optax'),
    ('optim.student.chain', ('sgd',), 'a sequence of (name in optax'),
    ('optim.student.chain', (('adamm', {}),), "no attribute 'adamm'"),
    ('optim.student.chain', (('sgd', {'lr': 1.0}),), "unexpected keyword argument 'lr'"),
    ('optim.student.chain', (('constant_schedule', {'value': 1.0}),), 'not a gradient transf'),
    ('train.steps', 0, 'at least 1'),
    ('train.accumulate', 0, 'at least 1'),
    ('mesh.fsdp', 0, 'at least 1, or -1'),
    ('checkpoint.every', 0, 'at least 1'),
    ('checkpoint.keep', 0, 'at least 1'),
    ('log.every', 0, 'at least 1'),
    ('log.probe', -1, 'a whole number at least 0: 0 is off'),
    ('log.probe', 0.5, 'a whole number'),
    ('log.judge', -1, 'a whole number at least 0: 0 is off'),
    ('critic.updates', -1, 'a whole number at least 0'),
    ('critic.merge', 1.5, 'at most 1: 1 is off'),
    ('method.alpha_range', (0.5, 3.0), 'empty, or two numbers with 1 <= low <= high'),
    ('method.alpha_range', (3.0,), 'empty, or two numbers'),
    ('method.alpha_ramp', -1, 'at least 0: 0 is off'),
    ('method.tau_ca_end', (0.5, 1.0), 'empty, or two numbers with 0 <= low < high'),
    ('method.tau_relax', 10, 'goes with method.tau_ca_end or method.tau_dm_end'),
    ('method.mean_variance.variance', 0.0, 'None or a number above 0'),
    ('method.mean_variance.wieght', 1.0, 'did you mean method.mean_variance.weight?'),
    ('method.gan.critic_weight', 0.0, 'above 0'),
    ('method.regularisers', 3, 'a sequence of names'),
    ('method.regularisers', (3,), 'a sequence of names'),
    ('method.gan', 1.0, 'a section with weight, critic_weight, r1, tau'),
    ('eval.prompts', 0, 'at least 1'),
    ('eval.held_out', 0, 'at least 1'),
    ('eval.batch', True, 'at least 1'),
    ('eval.teacher_steps', 0, 'at least 1'),
    ('seed', 2**32, 'at most 4294967295'),
    ('eval.guidance', 0.0, 'at least 1: 1 is no guidance'),
    ('eval.solver', 'hein', "did you mean 'heun'?"),
    ('method', 3, 'a section with schedule, alpha'),
    ('train.steps', {'total': 3}, 'a whole number'),
]


@pytest.mark.parametrize(('field', 'value', 'fragment'), DISTILL)
def test_one_wrong_field_of_a_distillation(field, value, fragment):
    (line,) = config_lib.validate(changed('emoji', {field: value}))
    assert line.startswith(f'{field}: {value!r}, ')
    assert fragment in line


@pytest.mark.parametrize(('field', 'value', 'fragment'), [
    ('teacher.name', 'lumnia', "known: emoji, lumina, sdxl, zimage, or"),
    ('teacher.path', '', 'must name a diffusers folder, gs:// URL or hub id: lumina does not ship'),
    ('data.path', '', 'the name of a set of prompts, or of embeddings'),
    ('data.path', None, 'the name of a set of prompts'),
    ('data.sizes', (1024, 1024), 'a sequence of (height, width) in pixels'),
    ('data.sizes', ((1024,),), 'a sequence of (height, width)'),
    ('data.sizes', ((1024, 0),), 'a sequence of (height, width)'),
    ('data.sizes', ((512, 512), (1024.0, 1024)), 'a sequence of (height, width)'),
    ('data.sizes', 'large', 'a sequence of (height, width)'),
    ('data.lengths', 256, 'an ascending sequence of token counts'),
    ('data.lengths', (64, 64), 'an ascending sequence'),
    ('data.lengths', (0, 64), 'an ascending sequence'),
    ('data.scenes', 2, 'no such field; known here: name, global_batch, path, sizes, lengths'),
])
def test_one_wrong_field_of_a_distillation_on_prompts(field, value, fragment):
    (line,) = config_lib.validate(changed('lumina', {field: value}))
    assert line.startswith(f'{field}: {value!r}, ')
    assert fragment in line


@pytest.mark.parametrize(('name', 'fields', 'line'), [
    ('emoji', {'method.weight_dm': 0.0, 'critic.updates': 0}, None),
    ('emoji', {'method.weight_dm': 0.0, 'method.gan.weight': 5e-3, 'critic.updates': 0},
     'critic.updates: 0, must be at least 1'),
    ('emoji', {'method.weight_ca': 0.0, 'method.weight_dm': 0.0,
               'method.mean_variance.weight': 1.0}, None),
    ('emoji', {'method.tau_ca': (0.8, 0.9), 'method.tau_ca_end': (0.0, 0.5),
               'method.tau_relax': 10}, 'method.tau_ca_end: (0.0, 0.5), its upper end'),
    ('lumina', {'log.judge': 8}, 'log.judge: 8, must be 0 for lumina'),
    ('lumina', {'method.gan.weight': 5e-3},
     "data.name: 'prompts', has no real images: the weight of method.gan, which needs them"),
    ('sdxl', {'teacher.path': 'x', 'data.path': 'x', 'method.gan.r1': 1.0},
     "teacher.attention: 'auto', must be 'xla' while method.gan.r1 is above 0"),
    ('sdxl', {'teacher.path': 'x', 'data.path': 'x', 'method.gan.r1': 1.0,
              'teacher.attention': 'xla'}, None),
    ('lumina', {'method.mean_variance.weight': 1.0},
     'method.mean_variance.weight: 1.0, needs method.mean_variance.mean and .variance'),
    ('lumina', {'method.mean_variance.weight': 1.0, 'method.mean_variance.mean': 0.075,
                'method.mean_variance.variance': 0.81}, None),
])
def test_objectives_that_go_together(name, fields, line):
    found = config_lib.validate(changed(name, fields))
    assert len(found) == (line is not None)
    assert not found or found[0].startswith(line)


def test_what_a_config_leaves_out_gets_its_default():
    """A hand-written config, or one from before a field, is as good as `defaults`."""
    new, old = load('lumina'), load('lumina')
    with old.unlocked():
        for field in ('mean_variance', 'gan', 'alpha_range', 'tau_relax', 'regularisers'):
            del old.method[field]
        del old.eval, old.critic['merge'], old.checkpoint['timeout']
    config_lib.check(old)
    assert old.to_dict() == new.to_dict()
    old.method.mean_variance.mean = 0.1  # its type is that of a number that may be given


@pytest.mark.parametrize(('field', 'value'), [('data.path', 'e.safetensors'),
                                              ('data.sizes', ((64, 64),))])
def test_fields_of_prompts_are_none_of_the_emoji_captions(field, value):
    (line,) = config_lib.validate(changed('emoji', {field: value}))
    assert line.startswith(f'{field}: {value!r}, but there is no such field')


def test_each_data_set_has_its_own_fields():
    lines = config_lib.validate(changed('emoji', {'data.name': 'embeddings'}))
    assert [line.split(':')[0] for line in lines] == ['data.scenes']
    assert config_lib.validate(changed('emoji_prompts', {'data.name': 'embeddings'})) == []


@pytest.mark.parametrize(('field', 'value', 'fragment'), [
    ('data.name', 'embeddings', "must be 'emoji'"),
    ('task', 'train', 'one of distill, pretrain, codec'),
    ('teacher.name', 'lumina', 'this one comes trained'),
    ('method.dropout', 1.0, 'below 1'),
    ('method.time_mean', None, 'a number'),
    ('method.time_std', 0.0, 'above 0'),
    ('teacher.model.denoiser.hidden_size', 190, 'must be a multiple of num_attention_heads'),
    ('teacher.model.denoiser.num_layers', 6.0, 'a whole number'),
    ('teacher.model.denoiser.axes_dim_rope', (16, 16), 'three even whole numbers'),
    ('teacher.model.denoiser.dtype', 'fp16', "'float32' or 'bfloat16'"),
    ('teacher.model.denoiser.hiden_size', 192, 'did you mean teacher.model.denoiser.hidden_size?'),
    ('teacher.model.text.dim', 96, "the denoiser's cap_feat_dim = 128"),
    ('teacher.model.text', (), 'a section with vocab_size'),
    ('student.steps', 4, 'no such field'),
])
def test_one_wrong_field_of_a_pretraining(field, value, fragment):
    (line,) = config_lib.validate(changed('emoji_teacher', {field: value}))
    assert line.startswith(f'{field}: {value!r}, ')
    assert fragment in line


def test_nextdits_own_errors_are_passed_on():
    fields = {'teacher.model.denoiser.axes_dim_rope': (16, 16, 32)}
    (line,) = config_lib.validate(changed('emoji_teacher', fields))
    assert 'axes_dim_rope (16, 16, 32) must be even numbers that sum to the head size 48' in line


def test_many_wrong_fields_are_reported_at_once():
    config = changed('emoji', {
        'seed': -1, 'critic.updates': 0, 'method.alpha': 1.0, 'data.global_batch': 31})
    with pytest.raises(config_lib.ConfigError) as caught:
        config_lib.check(config)
    head, *lines = str(caught.value).splitlines()
    assert head == 'config: 4 fields are wrong'
    assert sorted(line.split(':')[0] for line in lines) == [
        'critic.updates', 'data.global_batch', 'method.alpha', 'seed']


def test_one_is_not_many():
    with pytest.raises(config_lib.ConfigError, match='^config: 1 field is wrong\nseed: -1, '):
        config_lib.check(changed('emoji', {'seed': -1}))


@pytest.mark.parametrize(('field', 'nearest'), [
    ('method.weigth_ca', 'method.weight_ca'),
    ('alpha', 'method.alpha'),
    ('critics', 'critic'),
    ('optim.student.weight_deacy', 'optim.student.weight_decay'),
])
def test_an_unknown_field_is_told_the_nearest(field, nearest):
    (line,) = config_lib.validate(changed('emoji', {field: 1.0}))
    assert line == f'{field}: 1.0, but there is no such field; did you mean {nearest}?'


def test_an_unknown_field_like_no_other_is_told_the_known_ones():
    (line,) = config_lib.validate(changed('emoji', {'teacher.xyz': 1}))
    assert line.endswith(
        'known here: name, path, variant, allow_distilled, dtype, param_dtype, remat, '
        'attention')


@pytest.mark.parametrize(('path', 'name'), [
    ('method.regularisers', ('gan', 'mean_varianc')), ('method.regularisers', ('my.regulariser',)),
    ('method.schedule', 'my_module.my_schedule'), ('teacher.name', 'my_package.my_family'),
])
def test_what_cannot_be_imported_is_one_mistake(path, name):
    (line,) = config_lib.validate(changed('emoji', {path: name}))
    assert line.startswith(f'{path}: {name!r}, ') and ('imported' in line or 'known: ' in line)


def test_no_regulariser_has_no_section():
    config = config_lib.defaults('distill', {
        'teacher.name': 'emoji', 'data.name': 'emoji', 'method.alpha': 2.0, 'train.steps': 8,
        'optim.student.lr': 1e-5, 'optim.critic.lr': 1e-5, 'method.regularisers': ()})
    assert 'gan' not in config.method and config_lib.validate(config) == []


def test_a_users_regulariser_brings_its_fields(tmp_path, monkeypatch):
    (tmp_path / 'own_terms.py').write_text("""if True:
        from ddmd_jax.config.fields import FIXED, Field
        from ddmd_jax.config.rules import WEIGHT
        from ddmd_jax.method.regularisers import Regulariser
        class REGULARISER(Regulariser):
            name = 'smooth'
            fields = (Field('weight', WEIGHT, 0.0, FIXED, 'weight of smoothness'),)
            needs_real = True
    """)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_lib.defaults('distill', {
        'teacher.name': 'emoji', 'data.name': 'prompts', 'method.alpha': 2.0, 'train.steps': 8,
        'optim.student.lr': 1e-5, 'optim.critic.lr': 1e-5, 'method.regularisers': ['own_terms']})
    assert config.method.smooth.to_dict() == {'weight': 0.0} and 'gan' not in config.method
    assert config_lib.validate(config) == []
    config.method.smooth.weight = 1.0
    (line,) = config_lib.validate(config)
    assert line.startswith("data.name: 'prompts', has no real images: the weight of method.smooth")
    config.method.smooth.weight = -1.0
    (line,) = config_lib.validate(config)
    assert line == 'method.smooth.weight: -1.0, must be a number at least 0: 0 is off'


def test_a_renamed_field_is_one_mistake():
    config = changed('emoji', {'method.alhpa': 4.0})
    with config.unlocked():
        del config.method['alpha']
    (line,) = config_lib.validate(config)
    assert 'did you mean method.alpha?' in line


def test_required_fields_and_sections():
    config = load('emoji')
    with config.unlocked():
        del config.method['alpha'], config['optim'], config['critic']
    assert sorted(config_lib.validate(config)) == [
        'method.alpha: missing, must be a number',
        'optim.critic.lr: missing, must be a number above 0',
        'optim.student.lr: missing, must be a number above 0']


@pytest.mark.parametrize('fields', [
    {'method.alpha': 1, 'method.weight_ca': 0.0},
    {'method.alpha': 5, 'method.weight_dm': 0},
    {'method.shift': 3},
    {'method.tau_ca': [0.0, 0.9]},
    {'method.tau_dm': (0.0, 0.5)},
    {'method.tau_ca': (0.0, 0.5), 'method.schedule': 'decoupled_full'},
    {'student.steps': 1, 'data.global_batch': 7},
    {'student.steps': 64, 'data.global_batch': 64, 'method.tau_ca': (0, 0.99)},
    {'optim.student.chain': [('clip_by_global_norm', {'max_norm': 1.0}),
                             ('sgd', {'learning_rate': 0.1})], 'optim.student.name': 'mine'},
    {'optim.student.clip': 0, 'optim.student.warmup': 5, 'optim.student.decay': 1},
    {'mesh.data': 1, 'mesh.fsdp': -1},
    {'teacher.remat': 'dots', 'log.probe': 0},
])
def test_unusual_but_right(fields):
    assert config_lib.validate(changed('emoji', fields)) == []


@pytest.mark.parametrize(('fields', 'start', 'fragment'), [
    ({'method.weight_ca': 0.0, 'method.weight_dm': 0.0}, 'method.weight_ca: 0.0, must be above 0',
     'method.weight_dm and the weights of all regularisers are 0'),
    ({'method.schedule': 'decoupled_constrained', 'method.tau_dm': (0.0, 0.5)},
     'method.tau_dm: (0.0, 0.5), its upper end', 'above 0.75'),
    ({'student.steps': 64, 'data.global_batch': 64}, 'method.tau_ca: (0.0, 0.98)', 'above 0.9844'),
    ({'train.accumulate': 3}, 'data.global_batch: 32, must be a multiple',
     'student.steps * train.accumulate = 4 * 3: steps not dividing; the next batch that does: 36'),
    ({'train.on_health': 'raise_critic'}, 'optim.critic.decay: 0.5, must be 0',
     'the critic would stand still in those that are added'),
    ({'mesh.tensor': -1}, 'mesh.data: -1', 'only one of data, fsdp, tensor may be -1'),
])
def test_fields_that_do_not_go_together(fields, start, fragment):
    (line,) = config_lib.validate(changed('emoji', fields))
    assert line.startswith(start)
    assert fragment in line


def test_emoji_captions_are_for_the_emoji_teacher():
    fields = {'teacher.name': 'lumina', 'teacher.path': 'folder'}
    (line,) = config_lib.validate(changed('emoji', fields))
    assert line == ("data.name: 'emoji', must be one of prompts, embeddings, images with "
                    "teacher.name 'lumina'")


def test_the_emoji_teacher_has_one_size():
    (line,) = config_lib.validate(changed('emoji_prompts', {'data.sizes': ((48, 48),)}))
    assert line.startswith('data.sizes: ((48, 48),), must be empty for emoji')


def test_embeddings_of_any_size_may_be_given():
    fields = {'data.sizes': [[512, 768]], 'data.path': '/data/e.safetensors', 'teacher.path': 'a/b'}
    assert config_lib.validate(changed('lumina', fields)) == []


def test_defaults_of_the_architecture_may_be_left_out():
    config = load('emoji_teacher').unlock()
    del config.teacher.model.denoiser['unroll'], config.teacher.model.text['num_layers']
    assert config_lib.validate(config) == []
    del config.teacher.model.denoiser['num_kv_heads']  # the default, 8, does not fit 4 heads
    (line,) = config_lib.validate(config)
    assert 'num_attention_heads must be a multiple of num_kv_heads' in line


def test_a_field_reference_and_a_frozen_config_are_read_as_values():
    from ml_collections import FrozenConfigDict

    config = load('emoji')
    config.eval.guidance = config.method.get_ref('alpha')
    assert config_lib.validate(config) == []
    assert config_lib.validate(FrozenConfigDict(config)) == []


@pytest.mark.parametrize('change', [{'data.name': 'embedding'}, None])
def test_a_wrong_name_of_a_data_set_is_one_mistake(change):
    config = changed('lumina', change or {})
    config.unlock()
    if change is None:
        del config.data['name']
    (line,) = config_lib.validate(config)
    assert line.startswith('data.name')


def test_one_field_is_one_line(monkeypatch):
    """A new scalar is a line of the table: default, check, flag's type and docs follow."""
    new = fields.Field('critic.patience', rules.COUNT, 3, fields.FREE, 'updates it waits')
    monkeypatch.setattr(fields, 'DISTILL', (*fields.DISTILL, new))
    assert load('emoji').critic.patience == 3 == load('lumina').critic.patience
    (line,) = config_lib.validate(changed('emoji', {'critic.patience': 0}))
    assert line == 'critic.patience: 0, must be a whole number at least 1'
    assert 'critic.patience' not in comparable(load('emoji').to_dict())
    assert '`critic.patience`' in reference()


@pytest.mark.parametrize(('path', 'names'), [
    ('critic.weighting', WEIGHTINGS), ('method.normaliser', NORMALISERS),
    ('student.sampler', sampling.STUDENT_MODES), ('eval.solver', sampling.SOLVERS),
    ('teacher.attention', attention.KINDS), ('teacher.remat', ('none', *layers.REMAT_POLICIES)),
    ('train.teacher_passes', TEACHER_PASSES), ('train.offload', OFFLOAD),
    ('train.on_nan', rollback.ON_NAN), ('train.on_health', guards.ON_HEALTH),
    ('log.tracker', trackers.NAMES),
])
def test_the_table_names_what_the_modules_know(path, names):
    (rule,) = (f.rule for f in fields.COMMON + fields.DISTILL if f.path == path)
    assert rule.allowed == rules.choice(*names).allowed


def test_the_regularisers_of_the_table_are_the_built_in():
    assert load('emoji').method.regularisers == BUILT_IN


def test_the_reference_is_up_to_date():
    assert (ROOT / 'docs/config.md').read_text() == reference(), 'python docs/make_config.py'


def test_an_installed_package_brings_its_configs(tmp_path):
    """Of what a wheel holds, elsewhere: names work in any folder, files and overrides as ever."""
    site = tmp_path / 'site'
    subprocess.run([sys.executable, 'setup.py', '--quiet', 'build', f'--build-base={tmp_path}/base',
                    f'--build-lib={site}'], cwd=ROOT, check=True, capture_output=True)
    (tmp_path / 'mine.py').write_text(
        "from ddmd_jax.config import load\nget_config = lambda: load('lumina:decoupled_full')\n")
    # No device is touched: in a pod, processes have to find each other first.
    program = """if True:
        from absl import app
        from jax._src import xla_bridge
        from ddmd_jax import config, main
        def show(argv):
            config.check(main._CONFIG.value)
            configs = main._CONFIG.value, config.load('emoji'), config.load('mine.py')
            print(config.__file__, *((c.method.schedule, c.eval.prompts) for c in configs),
                  len(xla_bridge._backends), sep='|')
        app.run(show, flags_parser=main.parse_flags)
    """
    done = subprocess.run(
        [sys.executable, '-c', program, '--config=lumina:coupled_shared',
         '--config.eval.prompts=5'],
        cwd=tmp_path, check=True, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(site)})
    where, *found = done.stdout.strip().split('|')
    assert where.startswith(str(site))
    assert found == ["('coupled_shared', 5)", "('decoupled_hybrid', 256)",
                     "('decoupled_full', 8)", '0']
