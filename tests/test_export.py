"""A run's averaged student, written for others to load: what is written, what is refused."""

import http.server
import json
import os
import re
import shutil
import threading

import forked
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import safetensors.numpy
import tiny
import yaml
from flax import nnx
from saved import save

from ddmd_jax import families as teachers
from ddmd_jax.evaluate import few_steps
from ddmd_jax.export import card, write
from ddmd_jax.export.write import Wanted, export
from ddmd_jax.families import LoadOptions
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.nextdit import NextDiT
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distillation
from ddmd_jax.train.durable import checkpoint as ckpt, checksums, resume
from ddmd_jax.train.durable.checkpoint import CheckpointError
from ddmd_jax.util import errors, files, processes
from ddmd_jax.weights.flat import WeightsError

CONFIG = {'_class_name': lumina.TRANSFORMER, **published.TRANSFORMER}
SMALL = {'layers': {'attn': {'to_q': {'kernel': np.ones((2, 4, 6), np.float32)}}},
         'x_embedder': {'bias': np.arange(4, dtype=np.float32)}}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """The teacher's folder. A student has its shape: nothing but the config is looked at."""
    folder = tmp_path_factory.mktemp('teacher')
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope='module')
def ema():
    cfg = lumina.model_config(CONFIG, 'float32', 'none')
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype),
                        abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0))))


@pytest.fixture(scope='module')
def run(teacher, ema, tmp_path_factory):
    """Folder of a finished run of Lumina."""
    manifest = {'teacher.name': 'lumina', 'teacher.path': str(teacher)}
    return save(tmp_path_factory.mktemp('run'), manifest, ema)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Folder of a run of the embedded teacher."""
    return save(tmp_path_factory.mktemp('small'), {'teacher.name': 'emoji'}, SMALL, step=7)


def one_device():
    return sharding.make_mesh({}, jax.devices()[:1])


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)


def restore(workdir, abstract):
    layout = sharding.shard_tree(abstract, lumina.RULES, one_device())
    return ckpt.saved(workdir, 7).part('ema', abstract, layout)


# --- What is written ---


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_exported_student_reads_back_bitwise(run, ema, tmp_path, dtype):
    folder, card = export(run, tmp_path / 'deep' / 'out', Wanted(dtype=dtype))
    assert folder == tmp_path / 'deep' / 'out' / 'transformer'
    assert card == tmp_path / 'deep' / 'out' / 'README.md'
    assert json.loads((folder / 'config.json').read_text()) == json.loads(json.dumps(CONFIG))
    back = lumina.load(LoadOptions(str(folder), size=(16, 16))).params
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), ema)
    jax.tree.map(np.testing.assert_array_equal, back, rounded)


def test_a_teacher_that_moved_is_named_by_hand(ema, tmp_path):
    manifest = {'teacher.name': 'lumina', 'teacher.path': '/gone'}
    workdir = save(tmp_path / 'run', manifest, ema)
    with pytest.raises(WeightsError, match='no folder /gone'):
        export(workdir, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    pipeline = tmp_path / 'pipeline'  # the whole one will do as well as its transformer
    for name, content in {'model_index.json': {}, 'transformer/config.json': CONFIG,
                          'scheduler/scheduler_config.json': {
                              'shift': 6.0, 'base_shift': 0.5, 'use_beta_sigmas': True,
                              'shift_terminal': 0.1}}.items():
        (pipeline / name).parent.mkdir(parents=True, exist_ok=True)
        (pipeline / name).write_text(json.dumps(content))
    export(workdir, tmp_path / 'out', Wanted(teacher=str(pipeline)))
    made = json.loads((tmp_path / 'out/scheduler/scheduler_config.json').read_text())
    assert made['stochastic_sampling'] and made['shift'] == 6.0 and made['base_shift'] == 0.5
    assert not {'use_beta_sigmas', 'shift_terminal'} & set(made)  # the student's steps are its own
    assert few_steps(str(tmp_path / 'out'))[1] == 'renoise'
    index = json.loads((tmp_path / 'out/model_index.json').read_text())
    assert index['transformer'] == ['diffusers', lumina.TRANSFORMER]
    assert index['vae'] == [None, None]  # there was none


def test_a_bare_transformer_stays_one_and_says_so(run, tmp_path, capfd):
    export(run, tmp_path / 'out')
    assert 'is a bare transformer, and so is the student written' in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['README.md', 'transformer']


# --- What does not come to its end ---


@pytest.fixture
def pipeline(tmp_path):
    """A teacher's folder with everything that is copied beside its transformer."""
    for name, content in {
            'model_index.json': {'vae': ['diffusers', 'V'], 'tokenizer': ['transformers', 'T']},
            'transformer/config.json': CONFIG, 'scheduler/scheduler_config.json': {'shift': 6.0},
            'vae/config.json': {}, 'text_encoder/config.json': {}, 'tokenizer/t.json': {}}.items():
        file = tmp_path / 'pipeline' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return str(tmp_path / 'pipeline')


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob('*')) if p.is_file()}


class Killed(BaseException):
    """Stands for SIGKILL, of which nothing that tidies up hears."""


def killed_at(moment, monkeypatch, act):
    """Whether `act` was killed at its `moment`-th rename, from which on nothing is tidied up."""
    seen, own = [], (os.replace, files.remove)

    def replace(*args):
        seen.append(args)
        if len(seen) > moment:
            raise Killed
        own[0](*args)

    with monkeypatch.context() as m:
        m.setattr(files.os, 'replace', replace)
        m.setattr(files, 'remove', lambda path: own[1](path) if len(seen) <= moment else None)
        try:
            act()
        except Killed:
            return True
    return False


def test_an_export_that_is_killed_at_any_moment_is_begun_anew_by_the_same_command(
        run, pipeline, tmp_path, monkeypatch):
    wanted, out, kills = Wanted(teacher=pipeline), tmp_path / 'out', 0
    export(run, tmp_path / 'whole' / 'out', wanted)
    want = contents(tmp_path / 'whole' / 'out')
    assert {'transformer/config.json', 'vae/config.json', 'README.md'} < want.keys()
    assert write.MARK not in want
    while killed_at(kills, monkeypatch, lambda: export(run, out, wanted)):
        half, kills = contents(out), kills + 1
        export(run, out, wanted)
        assert contents(out) == want != half
        shutil.rmtree(out)
    assert kills >= 8 and contents(out) == want  # the mark, every file and folder, the card
    with pytest.raises(WeightsError, match='transformer exists already'):  # it had come to its end
        export(run, out, wanted)


def test_what_orbax_had_half_written_goes_too(run, pipeline, tmp_path):
    out = tmp_path / 'out'
    (out / 'params.orbax-checkpoint-tmp-7').mkdir(parents=True)
    (out / 'mine').write_text('')
    mark = {'names': ['params', 'README.md', '../pipeline'], 'machine': 'another', 'process': 1}
    (out / write.MARK).write_text(json.dumps(mark))
    export(run, out, Wanted('orbax', teacher=pipeline))
    assert sorted(p.name for p in out.iterdir()) == ['README.md', 'mine', 'params']
    assert (tmp_path / 'pipeline').is_dir()  # no name leads out of the folder


@pytest.mark.parametrize(('mark', 'words'), [
    ('{"names": [], "machine": MACHINE, "process": PARENT}', 'is being written by process'),
    ('{', 'cannot be read .*; choose another place or delete')])
def test_what_may_be_another_s_is_left(run, pipeline, tmp_path, mark, words):
    mark = mark.replace('MACHINE', json.dumps(processes.machine())).replace(
        'PARENT', str(os.getppid()))
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / write.MARK).write_text(mark)
    with pytest.raises(WeightsError, match=words) as e:
        export(run, tmp_path / 'out', Wanted(teacher=pipeline))
    assert len(str(e.value).splitlines()) == 1
    assert contents(tmp_path / 'out') == {write.MARK: mark.encode()}


@pytest.mark.parametrize(('where', 'error'), [
    ((safetensors.numpy, 'save_file'), safetensors.SafetensorError(
        'Error while serializing: I/O error: No space left on device (os error 28)')),
    ((files.shutil, 'copyfile'), OSError(28, 'No space left on device')),
    ((card, 'write'), OSError(28, 'No space left on device'))])
def test_a_full_disk_leaves_no_half_of_an_export(run, pipeline, tmp_path, monkeypatch, where,
                                                 error):
    def full(*args, **kwargs):
        raise error

    with monkeypatch.context() as m:
        m.setattr(*where, full)
        with pytest.raises(type(error)) as e:
            export(run, tmp_path / 'out', Wanted(teacher=pipeline))
    assert 'there is no room on the disk; make some, then run the same' in str(
        errors.environment(e.value))
    assert not contents(tmp_path / 'out')
    export(run, tmp_path / 'out', Wanted(teacher=pipeline))


# --- The embedded teacher, other formats, the card ---


@pytest.fixture(scope='module')
def emoji_run(tmp_path_factory):
    """(teacher, averaged parameters, folder) of a run of the embedded default."""
    teacher = teachers.load_teacher('emoji')
    ema = jax.tree.map(lambda x: 1.5 * np.asarray(x, np.float32), teacher.params)
    manifest = {'teacher.name': 'emoji', 'student.steps': 4, 'method.alpha': 2.5,
                'teacher_identity': teacher.identity, 'data.name': 'emoji', 'data_identity': 'x1'}
    folder = save(tmp_path_factory.mktemp('emoji'), manifest, ema, step=40)
    (folder / 'samples.png').write_bytes(b'a picture')
    (folder / 'eval.json').write_text(json.dumps({'rows': [
        {'name': 'real', 'steps': None, 'frechet': 0.0},
        {'name': 'student', 'steps': 4, 'frechet': 0.4567}]}))
    (folder / 'metrics.jsonl').write_text('{"step": 20, "health": "collapsing"}\n{"step": 40, '
                                          '"health": "healthy", "dm_rel_gap": 0.1, "x_std": 0.5}\n')
    return teacher, ema, folder


@pytest.mark.parametrize('average', [True, False])
def test_one_file_of_an_emoji_student_is_a_teacher_to_load(emoji_run, tmp_path, average):
    teacher, ema, workdir = emoji_run
    file, _ = export(workdir, tmp_path, Wanted('safetensors', ema=average))
    again = teachers.load_teacher(str(file))
    want = ema if average else jax.tree.map(lambda x: x + 1, ema)
    jax.tree.map(np.testing.assert_array_equal, again.params, want)
    # Its text side is the teacher's: captions are read as they were.
    read = [t.encode(['a red apple']) for t in (again, teacher)]
    jax.tree.map(np.testing.assert_array_equal, *read)


def test_an_orbax_checkpoint_is_the_tree_alone(emoji_run, tmp_path):
    import orbax.checkpoint as ocp

    _, ema, workdir = emoji_run
    folder, _ = export(workdir, tmp_path, Wanted('orbax', 'bfloat16'))
    with ocp.StandardCheckpointer() as reader:
        got = reader.restore(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), got, ema)


def test_the_card_says_what_it_is(emoji_run, tmp_path):
    *_, workdir = emoji_run
    names = {p.name for p in export(workdir, tmp_path)}
    assert names == {'transformer', 'vae', 'text_encoder', 'tokenizer', 'scheduler', 'pipeline.py',
                     'model_index.json', 'README.md'}
    card = (tmp_path / 'README.md').read_text()
    head = yaml.safe_load(card.split('---')[1])
    assert head['library_name'] == 'diffusers' and head['pipeline_tag'] == 'text-to-image'
    for words in ('# A 4-step student of emoji', '**without guidance**', '](samples.png)',
                  '| `method.alpha` | 2.5 |', '|student | 4 | 0.457 |', 'health *healthy*',
                  '; collapsing before, from update 20 to 20.',
                  'Twitter, Twemoji (CC-BY-4.0)', 'EMA weights after 40 updates',
                  emoji_run[0].identity,
                  f"from_pretrained('{tmp_path.name}', trust_remote_code=True)"):
        assert words in card.replace('| student', '|student'), words
    assert (tmp_path / 'samples.png').read_bytes() == b'a picture'
    assert not re.search(r'\n\n\n|[ \t]\n', card)


def test_the_card_has_that_of_the_prompts(ema, teacher, tmp_path):
    (tmp_path / 'p.txt').write_text('a red fox\na boat\n')
    done = forked.run('ddmd_jax.prepare', 'prompts', f'--input={tmp_path}/p.txt',
                      f'--out={tmp_path}/set')
    assert done.returncode == 0, done.stderr
    workdir = as_run(tmp_path / 'run', 'lumina', ema, **{
        'teacher.path': str(teacher), 'data.path': f'{tmp_path}/set'})
    export(workdir, tmp_path / 'out')
    card = (tmp_path / 'out/README.md').read_text()
    assert '2 of them, made from' in card and 'p.txt' in card
    assert 'the run was not evaluated' in card
    assert str(tmp_path) not in card  # no places of a machine
    # Another set lies there by now: it is not what the student was trained on.
    workdir = as_run(tmp_path / 'again', 'lumina', ema, **{
        'teacher.path': str(teacher), 'data.path': f'{tmp_path}/set'},
        identities={'data_identity': 'another'})
    export(workdir, tmp_path / 'other')
    card = (tmp_path / 'other/README.md').read_text()
    assert 'made from' not in card and 'identity `another`' in card


def as_run(folder, name, params, step=40, identities=None, **fields):
    """A run's folder as `main` leaves it: its config, and the manifest that is made of it."""
    config = tiny.load_config(name)
    config.update_from_flattened_dict(fields)
    save(folder, resume.manifest_of(config, identities or {}), params, step)
    (folder / 'config.json').write_text(json.dumps(config.to_dict()))
    return folder


@pytest.mark.parametrize(('flags', 'stochastic', 'words'), [
    ({}, False, '|student | 4 | 0.457 |'),
    ({'sampler': 'renoise'}, True, "None: the run judged what 'deterministic' draws"),
    ({'ema': False}, False, 'None: these are the raw weights'),
    ({'step': 30}, False, 'None: the run judged its weights at step 30, these are of 40')])
def test_the_run_says_how_it_draws_and_figures_are_of_what_is_exported(
        emoji_run, tmp_path, flags, stochastic, words):
    run = as_run(tmp_path / 'run', 'emoji', emoji_run[1], **{'student.sampler': 'deterministic'})
    (run / 'samples.png').write_bytes(b'a picture')
    (run / 'eval.json').write_text(json.dumps({
        'rows': [{'name': 'student', 'steps': 4, 'frechet': 0.4567}],
        'step': flags.pop('step', 40)}))
    export(run, tmp_path / 'out', Wanted(**flags))
    made = json.loads((tmp_path / 'out/scheduler/scheduler_config.json').read_text())
    assert made['stochastic_sampling'] == stochastic
    card = (tmp_path / 'out/README.md').read_text().replace('| student', '|student')
    assert words in card
    assert (tmp_path / 'out/samples.png').exists() == ('None: ' not in card)


@pytest.mark.parametrize(('family', 'network'), [
    ('emoji', 'student.safetensors'), ('lumina', 'transformer'), ('sdxl', 'unet'),
    ('zimage', 'transformer')])
def test_what_is_exported_is_found_by_init_from(tmp_path, family, network):
    """The folder that `export` was given will do, for whichever family."""
    names = teachers.get(family).export.names['safetensors']
    assert names[0] == network
    find = lambda path: distillation.network_at(teachers.get(family), str(path))
    assert find(tmp_path) == str(tmp_path)
    (tmp_path / network).mkdir()
    assert find(tmp_path) == find(tmp_path / network) == str(tmp_path / network)


def test_a_run_starts_from_the_folder_of_an_emoji_student(emoji_run, tmp_path):
    export(emoji_run[2], tmp_path / 'one', Wanted('safetensors'))
    export(emoji_run[2], tmp_path / 'pipe')
    config = tiny.load_config('emoji')
    read = lambda folder: distillation.load_teacher(config, one_device(), distillation.network_at(
        teachers.get('emoji'), str(folder))).params
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / 'one'), emoji_run[1])
    with pytest.raises(WeightsError, match='pipe is a folder, .* one file; give that, such as '
                       'the student.safetensors that `export --format=safetensors` writes'):
        read(tmp_path / 'pipe')


@pytest.mark.parametrize('name', ['samples.png', 'README.md'])
def test_nothing_beside_the_model_is_overwritten_either(emoji_run, tmp_path, name):
    (tmp_path / name).write_text('mine')
    with pytest.raises(WeightsError, match=f'{name} exists already'):
        export(emoji_run[2], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_path_on_disk_is_no_name_on_the_hub(ema, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights/lumina').symlink_to(teacher)
    workdir = as_run(tmp_path / 'run', 'lumina', ema, **{'teacher.path': 'weights/lumina'})
    export(workdir, tmp_path / 'out')
    assert 'base_model' not in (tmp_path / 'out/README.md').read_text()


def test_a_card_names_the_teacher_on_the_hub(ema, teacher, tmp_path):
    workdir = as_run(tmp_path / 'run', 'lumina', ema, **{'teacher.path': 'owner/lumina'})
    export(workdir, tmp_path / 'out', Wanted(teacher=str(teacher)))
    head = yaml.safe_load((tmp_path / 'out/README.md').read_text().split('---')[1])
    assert head['base_model'] == 'owner/lumina' and head['base_model_relation'] == 'finetune'


def test_another_teacher_than_the_runs_is_refused(emoji_run, tmp_path):
    run = save(tmp_path / 'run', {'teacher.name': 'emoji', 'teacher_identity': 'another'},
               emoji_run[1])
    with pytest.raises(CheckpointError, match='distils another teacher .identity another. than'):
        export(run, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_what_is_installed_has_all_that_is_exported_and_reported():
    """`package_data` of setup.py: templates, and code that is shipped and not imported."""
    text = (tiny.ROOT / 'setup.py').read_text()
    patterns = re.findall(r"'((?:families|study|export|report|evaluation)/[^']+)'", text)
    package = tiny.ROOT / 'ddmd_jax'
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    wanted = {*package.rglob('*.jinja'), *(package / 'families/emoji/code').glob('*.py')}
    assert wanted <= shipped and len(wanted) >= 7


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as an upload asks for; what it was sent is in `server.seen`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        here = f'http://127.0.0.1:{self.server.server_port}/owner/name'
        self.server.seen.append((self.path, body))
        if self.path == '/api/repos/create':
            answer = {'url': here, 'name': 'owner/name', 'id': '1'}
        elif '/preupload/' in self.path:
            answer = {'files': [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                                for f in json.loads(body)['files']]}
        else:
            answer = {'commitUrl': f'{here}/commit/1', 'commitOid': '1',
                      'success': True}
        self._say(answer)

    def do_GET(self):
        self._say({'id': 'owner/name', 'siblings': [], 'sha': '0' * 40})

    def _say(self, answer):
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_student_is_pushed(emoji_run, tmp_path, hub):
    *_, workdir = emoji_run
    code, own, err = command(
        f'--checkpoint={workdir}', f'--out={tmp_path}/o', '--push=owner/name', '--private',
        environ={'HF_ENDPOINT': f'http://127.0.0.1:{hub.server_port}', 'HF_TOKEN': 'hf_x',
                 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_HOME': str(tmp_path)})
    assert code == 0 and not own, err
    made = json.loads(next(body for path, body in hub.seen if path == '/api/repos/create'))
    assert (made['organization'], made['name']) == ('owner', 'name')
    assert made.get('private') or made.get('visibility') == 'private', made
    sent = next(body for path, body in hub.seen if '/commit/' in path).decode()
    for name in ('README.md', 'model_index.json', 'transformer/config.json'):
        assert f'"path": "{name}"' in sent or f'"path":"{name}"' in sent, name


def test_a_hub_that_does_not_answer_is_one_line_and_loses_nothing(emoji_run, tmp_path):
    *_, workdir = emoji_run
    code, own, err = command(
        f'--checkpoint={workdir}', f'--out={tmp_path}/o', '--push=owner/name',
        environ={'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_TOKEN': 'hf_x', 'HF_HOME': str(tmp_path)})
    assert code == 1 and len(own) == 1, err
    assert own[0].startswith('export: owner/name cannot be pushed (')
    assert (tmp_path / 'o/model_index.json').is_file()


def test_the_average_is_read_and_not_the_student(small):
    got = restore(small, like(SMALL))
    jax.tree.map(np.testing.assert_array_equal, got, SMALL)
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(got))


def test_the_manifest_comes_with_the_newest_step(small):
    saved = ckpt.saved(small)
    assert saved.step == 7 and saved.manifest['teacher.name'] == 'emoji'


# --- Refusals: one line ---


def no_folder(run, small, tmp_path):
    return tmp_path / 'nothing', 'nothing holds no checkpoints; give the --workdir of a run'


def no_checkpoint(run, small, tmp_path):
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    return tmp_path / 'run', 'is empty: the run has saved nothing yet'


def damaged_manifest(run, small, tmp_path):
    save(tmp_path / 'run', {'teacher.name': 'lumina'}, SMALL)
    next((tmp_path / 'run/checkpoints/3/manifest').rglob('metadata')).write_text('{')
    return tmp_path / 'run', r'checkpoints/3 has no readable manifest \(.*\); see what is damaged'


def unknown_teacher(run, small, tmp_path):
    folder = save(tmp_path / 'run', {'teacher.name': 'sora'}, SMALL)
    return folder, "a teacher that is unknown here: no teacher family 'sora'; known: emoji, lumina"


def no_student(run, small, tmp_path):
    folder = save(tmp_path / 'run', {'task': 'pretrain', 'teacher.name': 'emoji'}, SMALL)
    return folder, 'trains a teacher; its result is .*/run/teacher.safetensors'


def damaged_file(run, small, tmp_path):
    """One bit of the tensors: still readable, and another student."""
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    folder = save(tmp_path / 'run', {'teacher.name': 'lumina', 'teacher.path': str(tmp_path)},
                  SMALL) / 'checkpoints' / '3'
    path = max(checksums.files(folder).values(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return tmp_path / 'run', r'3 is damaged \(.* is not what was written\); start the run'


def another_shape(run, small, tmp_path):
    config = CONFIG | {'cap_feat_dim': 32}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    manifest = {'teacher.name': 'lumina', 'teacher.path': str(tmp_path)}
    return save(tmp_path / 'run', manifest, SMALL), 'checkpoints/3/state holds no student of this'


@pytest.mark.parametrize('case', [
    no_folder, no_checkpoint, damaged_manifest, damaged_file, unknown_teacher, no_student,
    another_shape])
def test_what_cannot_be_exported_is_refused_in_one_line(run, small, tmp_path, case):
    workdir, words = case(run, small, tmp_path)
    with pytest.raises(CheckpointError, match=words) as e:
        export(workdir, tmp_path / 'out')
    assert len(str(e.value).splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_export_never_overwrites(run, tmp_path):
    mine = tmp_path / 'transformer' / 'mine.txt'
    mine.parent.mkdir()
    mine.write_text('kept')
    with pytest.raises(WeightsError, match='transformer exists already; choose another place'):
        export(run, tmp_path)
    assert mine.read_text() == 'kept' and len(list(tmp_path.rglob('*'))) == 2


@pytest.mark.parametrize('changes, words', [
    # Neither padded nor cut nor made up nor left out.
    ({'x_embedder': {'bias': np.zeros(5)}}, r'x_embedder/bias is \(4,\), not \(5,\)'),
    ({'x_embedder': {'bias': np.zeros(3)}}, r'x_embedder/bias is \(4,\), not \(3,\)'),
    ({'out_proj': {'bias': np.zeros(4)}}, r'out_proj/bias is absent, not \(4,\)'),
    ({'x_embedder': {}}, r'x_embedder/bias is \(4,\), not wanted'),
])
def test_an_average_of_another_shape_is_no_student(small, changes, words):
    abstract = like(SMALL | changes)
    with pytest.raises(CheckpointError, match=rf'7/state holds no student .*\({words}\)') as e:
        restore(small, abstract)
    assert len(str(e.value).splitlines()) == 1


# --- The command ---


def command(*args, environ=()):
    """``(exit code, lines of export's own on stderr, everything on stderr)``."""
    done = forked.run('ddmd_jax.export', *args, **dict(environ))
    own = [x for x in done.stderr.splitlines() if x.startswith('export: ')]
    return done.returncode, own, done.stderr


@pytest.mark.parametrize('args, words', [
    (['--out=o'], 'export: no --checkpoint given; name the --workdir of a run'),
    (['--checkpoint=c', '--out='], 'export: no --out given'),
    (['--checkpoint=c', 'o'], "export: unexpected argument 'o'"),
    (['--checkpoint=c', '--out=o', '--push=name'], 'export: --push=name is not OWNER/NAME'),
    (['--checkpoint=/nowhere', '--out=o'], 'export: /nowhere holds no checkpoints; give the'),
])
def test_bad_input(args, words):
    code, own, everything = command(*args)
    assert code == 1, everything
    assert len(own) == 1 and own[0].startswith(words)
    assert everything.splitlines() == own


def test_the_command_says_one_line_about_a_run_it_cannot_export(small, tmp_path):
    """Checkpoints are opened here: what Orbax has to say about that is of no use."""
    code, own, everything = command(f'--checkpoint={small}', f'--out={tmp_path / "o"}')
    assert code == 1 and len(own) == 1
    assert everything.splitlines() == own
