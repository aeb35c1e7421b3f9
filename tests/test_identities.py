"""What is written down of a run's weights is compared by whoever reads it."""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from saved import save

from ddmd_jax import config as config_lib, sample
from ddmd_jax.data import DataFileError, conditioning, embeddings
from ddmd_jax.diffusion.time import Shift, StepTable
from ddmd_jax.evaluation import pictures
from ddmd_jax.export import student
from ddmd_jax.families.base import TextEncoder
from ddmd_jax.families.emoji import codec, scenes
from ddmd_jax.families.emoji.pretraining import pretraining
from ddmd_jax.parallel import sharding
from ddmd_jax.study import summarise
from ddmd_jax.train import distillation, prompts
from ddmd_jax.train.durable import checkpoint as ckpt, checksums, resume
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import flat

TREE = {'bias': np.ones(3, np.float32)}


# --- A student and its teacher ---


def of_teacher(identity, folder, **more):
    manifest = {'task': 'distill', 'teacher.name': 'lumina', 'teacher.path': str(folder),
                'teacher_identity': identity, **more}
    return ckpt.Saved(folder / 'checkpoints' / '3', manifest)


def test_a_student_goes_with_the_teacher_it_distils(tmp_path):
    for known, given in (('a', 'a'), ('a', None), (None, 'a')):
        student.check_teacher(of_teacher(known, tmp_path), given, Shift(3.0), '--teacher')
    with pytest.raises(ckpt.CheckpointError, match='another teacher .identity a. than the one '
                       r'given .b.; give the path of its own with --teacher'):
        student.check_teacher(of_teacher('a', tmp_path), 'b', Shift(3.0), '--teacher')


@pytest.mark.parametrize('own, given, fits', [
    (Shift(6.0), Shift(6.0), True), (Shift(6.0), Shift(3.0), False),
    (StepTable(), StepTable(), True), (StepTable(), StepTable(beta_end=0.02), False),
    (StepTable(), Shift(3.0), False), (None, Shift(3.0), True)])
def test_weights_of_one_identity_draw_by_the_time_they_were_distilled_by(tmp_path, own, given,
                                                                         fits):
    """A folder's scheduler_config.json is no weight, and moves every step of a student."""
    said = {'teacher_time': own.identity} if own else {}  # older manifests do not
    saved = of_teacher('a', tmp_path, **said)
    check = lambda saved: student.check_teacher(saved, 'a', given, '--teacher')
    if fits:
        return check(saved)
    with pytest.raises(ckpt.CheckpointError, match='a teacher of another time .* by its scheduler'):
        check(saved)
    check(of_teacher('a', tmp_path, **said, **{'method.shift': 2.0}))  # the run's own


@pytest.mark.parametrize('name', ['teacher_time', 'encoder_identity'])
def test_a_run_goes_on_with_the_time_and_the_encoder_it_had(tmp_path, name):
    """Neither is in the identity of the teacher's weights, nor in that of a set of prompts."""
    config = config_lib.load('lumina')
    of = lambda **more: resume.manifest_of(config, {'teacher_identity': 'a', **more})
    folder = save(tmp_path / 'run', of(**{name: 'x'}), TREE) / 'checkpoints' / '3'
    ckpt.check_manifest(folder, of(**{name: 'x'}))
    with pytest.raises(ckpt.CheckpointError, match=f"{name}: 'x' -> 'y'"):
        ckpt.check_manifest(folder, of(**{name: 'y'}))
    older = save(tmp_path / 'older', of(), TREE) / 'checkpoints' / '3'
    ckpt.check_manifest(older, of(**{name: 'y'}))  # it does not say


def test_trainings_of_teacher_and_codec_name_their_data(tmp_path):
    """Drawings, and the codec whose latents a teacher learns; older manifests said 'none'."""
    config = config_lib.load('emoji_teacher')
    of = lambda data: resume.manifest_of(
        config, {'teacher_identity': 'none', 'data_identity': data})
    name = pretraining(config).identity
    assert scenes.load().identity in name and codec.load().identity in name
    assert scenes.load().identity in codec.training(config_lib.load('emoji_codec')).identity
    older = save(tmp_path / 'older', of('none'), TREE) / 'checkpoints' / '3'
    ckpt.check_manifest(older, of(name))
    ours = save(tmp_path / 'ours', of(name), TREE) / 'checkpoints' / '3'
    with pytest.raises(ckpt.CheckpointError, match='data_identity'):
        ckpt.check_manifest(ours, of('others'))


def test_a_distillation_says_by_which_time_and_encoder():
    """Prompts that are encoded as they are needed have the identity of their texts alone."""
    text = TextEncoder('x', {}, lambda texts: {'mask': np.ones((len(texts), 2), bool)},
                       lambda params, tokens: {'mask': tokens['mask']}, 2, 4, (), 'of the encoder')
    stored = type('Stored', (list,), {'identity': 'of the texts'})(['a cat'])
    found = prompts.as_needed(stored, text, sharding.make_mesh({}, jax.devices()[:1]))
    assert (found.identity, found.encoder) == ('of the texts', 'of the encoder')
    teacher = types.SimpleNamespace(identity='t', time=Shift(2.0))
    assert distillation.identities(teacher, found) == {
        'teacher_identity': 't', 'teacher_time': 'Shift(shift=2.0)',
        'data_identity': 'of the texts', 'encoder_identity': 'of the encoder'}



def test_a_run_goes_on_from_a_teacher_that_has_moved(tmp_path):
    """What lies there counts, not where."""
    config = config_lib.load('lumina')
    config.teacher.path = '/old/place'
    manifest = resume.manifest_of(config, {'teacher_identity': 'a'})
    assert manifest['teacher.path'] == '/old/place'
    run = save(tmp_path, manifest, TREE)
    config.teacher.path = '/new/place'
    folder = run / 'checkpoints' / '3'
    ckpt.check_manifest(folder, resume.manifest_of(config, {'teacher_identity': 'a'}))
    with pytest.raises(ckpt.CheckpointError, match="teacher_identity: 'a' -> 'b'"):
        ckpt.check_manifest(folder, resume.manifest_of(config, {'teacher_identity': 'b'}))


def test_an_older_step_is_drawn_with_when_it_is_named(tmp_path):
    run = save(tmp_path, {'teacher.name': 'emoji'}, TREE, step=3)
    later = save(tmp_path / 'later', {'teacher.name': 'emoji'}, TREE, step=5)
    (later / 'checkpoints' / '5').rename(run / 'checkpoints' / '5')
    assert ckpt.saved(run).step == 5
    model = sample.find_model(run, '', None, 3)
    assert model.saved.step == 3
    with pytest.raises(ckpt.CheckpointError, match='has no step 4; there are 3, 5'):
        sample.find_model(run, '', None, 4)


def test_a_damaged_checkpoint_is_read_by_nobody(tmp_path):
    run = save(tmp_path, {'teacher.name': 'emoji'}, TREE)
    file = max(checksums.files(run / 'checkpoints' / '3').values(), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ckpt.CheckpointError, match='is damaged .* is not what was written'):
        ckpt.saved(run).part('ema', TREE, None)


# --- Embeddings and their encoder ---


def test_embeddings_of_another_encoder_are_refused(tmp_path):
    arrays = {'embeds': np.ones((2, 4), ml_dtypes.bfloat16)}
    card = {'width': 4, 'length': 2, 'identity': 'x', 'encoder_identity': 'a'}
    embeddings.write(tmp_path / 'e', card, arrays, [('a cat', arrays)])
    for known in ('a', None):
        assert conditioning.open_embeddings(str(tmp_path / 'e'), 4, known).identity == 'x'
    with pytest.raises(DataFileError, match='of another text encoder .a. than the teacher'):
        conditioning.open_embeddings(str(tmp_path / 'e'), 4, 'b')


# --- Figures and the weights they speak of ---


def judged(folder, seed=0, step=3, **fields):
    """A run's folder with an ``eval.json``."""
    folder.mkdir()
    row = {'name': 'student', 'steps': 4, 'evaluations': 4, 'guidance': 1.0, 'frechet': 2.0}
    config = {'seed': seed, 'student': {'steps': 4}, 'log': {'every': seed}, **fields}
    (folder / 'eval.json').write_text(json.dumps(
        {'rows': [row | fields], 'step': step, 'config': config}))
    return str(folder)


def test_only_runs_alike_are_averaged(tmp_path):
    first, second = (summarise.load(judged(tmp_path / str(i), i)) for i in range(2))
    summarise.check_alike([first, second])
    other = summarise.load(judged(tmp_path / 'other', 0, 9, steps=50))
    with pytest.raises(UserError, match=r'differ in more than their seed.*step: 3 and 9; steps: '
                       'None and 50; student.steps: 4 and 50'):
        summarise.check_alike([first, second, other])


def test_a_run_has_no_spread_with_itself(tmp_path):
    runs = [summarise.Evaluated(str(tmp_path / name), [], {}, weights)
            for name, weights in (('a', 'x'), ('b', 'y'), ('copy', 'x'))]
    summarise.check_alike(runs[:2])
    with pytest.raises(UserError, match='/a and .*/copy are of one student .weights x.'):
        summarise.check_alike(runs)
    with pytest.raises(UserError, match='are of one student'):  # an older eval.json says no weights
        summarise.check_alike([summarise.Evaluated(str(tmp_path / 'a'), [], {})] * 2)


def test_weights_over_a_mesh_have_one_name_however_they_lie():
    assert len(tiny.run_on_devices(__file__).strip()) == 16


def one_name():
    """On eight devices: the name of weights, which no layout changes and every step of training."""
    tree = {'kernel': np.arange(64 * 16, dtype=np.float32).reshape(64, 16),
            'bias': np.ones(3, np.float32)}
    names = set()
    for axes, rules in (({'fsdp': 8}, ((r'kernel', ('fsdp', None)), (r'.', ()))),
                        ({'tensor': 8}, ((r'kernel', (None, 'tensor')), (r'.', ()))),
                        ({'data': 8}, ((r'.', ()),))):
        mesh = sharding.make_mesh(axes)
        placed = jax.device_put(tree, sharding.shard_tree(tree, rules, mesh))
        names.add(flat.corner_identity(placed, mesh))
    (name,) = names
    for leaf in tree:
        moved = jax.device_put(tree | {leaf: tree[leaf] + 1e-3}, sharding.replicated(mesh))
        assert flat.corner_identity(moved, mesh) != name
    return name


# --- Values that are not finite ---


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_writers_refuse_what_is_not_finite(tmp_path, bad):
    with pytest.raises(flat.WeightsError, match='a/kernel holds values that are not finite'):
        flat.save(tmp_path / 'w.safetensors', {'a': {'kernel': np.asarray([1, bad])}}, {})
    rows = {'embeds': np.asarray([[1, bad]], ml_dtypes.bfloat16)}
    good = {'embeds': np.ones((1, 2), ml_dtypes.bfloat16)}
    card = {'width': 2, 'length': 1, 'identity': 'x'}
    with pytest.raises(DataFileError, match="makes embeds that are not finite of 'a cat'"):
        embeddings.write(tmp_path / 'e', card, good, [('a dog', good), ('a cat', rows)])
    with pytest.raises(DataFileError, match='of the null prompt'):
        embeddings.write(tmp_path / 'e', card, rows, [])
    images = np.zeros((2, 4, 4, 3))
    images[1, 0, 0, 0] = bad
    with pytest.raises(UserError, match='1 of 96 values of images are not finite'):
        pictures.to_uint8(images)
    assert not list(tmp_path.iterdir())


def test_a_narrow_dtype_is_named(tmp_path):
    with pytest.raises(flat.WeightsError, match='not finite in float16; another dtype'):
        flat.save(tmp_path / 'w', {'a': np.asarray([1e6])}, {}, dtype='float16')


if __name__ == '__main__':
    print(one_name())
