"""kill -9 at random points: what a run ends with is, bit for bit, what it would have ended with.

Each killed run is started again with the same command, and killed again, until it is through;
then it is compared with one that nobody touched. The clocks of killed runs are put back a day.
Networks are killed twice, the toy, which starts in seconds, twenty times.
"""

import random
import shutil
import signal

import pytest
import runs

STEPS = 12
# What is being done when the kill comes, and the longest it may take to come, in seconds: a step,
# the copy to the host, the writing of arrays, of the data's place and of the manifest, the
# checksums, the retention, the evaluation.
SITES = {'step': 0.05, 'saving': 0.05, 'saved': 0.3, 'place': 0.02, 'manifest': 0.02,
         'summing': 0.02, 'evaluation': 0.5}
OF_TOY = tuple(site for site in SITES if site != 'evaluation')  # it has nothing to draw
TWO = {'data.global_batch': 16, 'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.tensor': 2,
       'train.steps': STEPS}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return runs.Runs(tmp_path_factory.mktemp('kill'), TOY='1')


@pytest.fixture(scope='module')
def untouched(toy):
    """A run of the toy."""
    toy.finish(toy.root / 'untouched', {'train.steps': STEPS})
    return toy.root / 'untouched'


def point(rng, site):
    """Words for the driver: a site, the visit, the delay."""
    visit = 1 if site == 'evaluation' else rng.randint(1, 3)
    return f'{site}:{visit}:{rng.choice([0, rng.uniform(0, SITES[site])]):.3f}'


def killed_until(started, name, sites, **environ):
    """Folders of runs that came through, killed at each of `sites` on the way, the last first."""
    rng, left, done, points = random.Random(name), list(sites), [], []
    while left:
        workdir = started.root / f'{name}{len(done)}'
        while True:
            words = point(rng, left[-1]) if left else ''
            process = started.start(workdir, {'train.steps': STEPS}, KILL=words, CLOCK='2',
                                    **environ)
            out, err = process.communicate(timeout=300)
            if process.returncode == 0:  # the site was not come to as often
                done.append(workdir)
                break
            assert process.returncode == -signal.SIGKILL, f'{words}\n{out}\n{err}'
            points.append(words)
            left.pop()
    print(f'killed at {", ".join(points)}; {len(done)} runs came through')
    assert len(points) == len(sites) and done
    return done


@pytest.mark.slow
def test_networks_that_are_killed_twice_end_as_if_they_had_not_been(tmp_path):
    networks = runs.Runs(tmp_path)
    whole = tmp_path / 'whole'
    networks.finish(whole, {'train.steps': STEPS}, EVALUATE='1')
    for workdir in killed_until(networks, 'killed', ('evaluation', 'saved'), EVALUATE='1'):
        runs.assert_same(whole, workdir, STEPS)
        assert runs.evaluated(workdir) == runs.evaluated(whole)


@pytest.mark.faults
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(toy, untouched):
    for workdir in killed_until(toy, 'killed', random.Random(1).sample(OF_TOY * 4, 20)):
        runs.assert_same(untouched, workdir, STEPS)


def two(toy, workdir, kill=('', '')):
    """(exit code, stderr) of each of two processes of a run, told where to be killed."""
    started = toy.start_together(2, workdir, TWO, ['--peer_timeout=4'], KILL=list(kill),
                                 CLOCK=['2', '3'] if any(kill) else '')
    return [(p.returncode, err) for p in started for _, err in [p.communicate(timeout=300)]]


@pytest.mark.faults
def test_one_or_both_of_two_processes_killed_end_as_if_they_had_not_been(toy):
    """Who is left says so and ends with 1, or is aborted by JAX where process 0 is the victim.

    Process 0 alone writes JSON items and checksums.
    """
    assert [code for code, _ in two(toy, toy.root / 'two')] == [0, 0]
    rng, workdir, points = random.Random(2), toy.root / 'two-killed', []
    anywhere = lambda: rng.choice(['step', 'saving', 'saved'])
    victims = [(site, '') for site in ('step', 'place', 'manifest', 'summing')] + [
        ('', anywhere()) for _ in range(3)] + [(anywhere(), anywhere()) for _ in range(3)]
    rng.shuffle(victims)
    while victims:
        words = [point(rng, site) if site else '' for site in victims[-1]]
        ended = two(toy, workdir, words)
        if all(code == 0 for code, _ in ended):  # came through: another one
            runs.assert_same(toy.root / 'two', workdir, STEPS)
            workdir = workdir.with_name(f'{workdir.name}+')
            continue
        codes = [code for code, _ in ended]
        of_coordinator = {-signal.SIGABRT} if codes[0] == -signal.SIGKILL else set()
        assert -signal.SIGKILL in codes, (words, ended)
        assert set(codes) <= {-signal.SIGKILL, 1} | of_coordinator, (words, ended)
        for i, (code, err) in enumerate(ended):
            if code == 1:
                assert runs.said(err)[-1].startswith(f'main: process {i}: '), (words, err)
                assert 'Traceback' not in err and 'Fatal Python error' not in err, (words, err)
        points.append(words)
        victims.pop()
    print(f'killed at {points}')
    assert len(points) == 10
    assert [code for code, _ in two(toy, workdir)] == [0, 0]
    runs.assert_same(toy.root / 'two', workdir, STEPS)


@pytest.mark.slow
@pytest.mark.faults
def test_damage_is_told_and_left_behind_and_the_end_is_the_same(toy, untouched):
    """The newest checkpoint of a finished run, one bit changed: two steps are done again."""
    shutil.copytree(untouched, toy.root / 'damaged')
    folder = toy.root / 'damaged' / 'checkpoints' / str(STEPS)
    path = max(folder.rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    _, err = toy.finish(toy.root / 'damaged', {'train.steps': STEPS})
    (warning,) = runs.said(err, 'warning: ')
    assert f'checkpoints/{STEPS} is damaged (' in warning and 'is not what was written' in warning
    assert warning.endswith(f'going on from step {STEPS - 2}')
    runs.assert_same(untouched, toy.root / 'damaged', STEPS)
