"""Studies: what is run, by which rule a claim holds, what the page says, and that it goes on."""

import json
import re
import signal
import time

import forked
import numpy as np
import pytest
import tiny
from hypothesis import given, strategies as st

from ddmd_jax import config as config_lib
from ddmd_jax.study import (
    claims,
    claims_page,
    examine,
    results as files,
    statistics as rule,
    suites,
    trials,
)

figures = st.lists(st.floats(-5, 5), min_size=3, max_size=6)

# --- The rule ---


def test_intervals_are_students():
    """Against the table of Student's t: 4.303 for 3 seeds."""
    found = rule.interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.count == 3
    assert found.high - found.mean == pytest.approx(4.3027 / np.sqrt(3), rel=1e-4)
    assert rule.interval([0.3]) == rule.Interval(0.3, 0.3, 0.3, 1)


@pytest.mark.parametrize(('values', 'above', 'within'), [
    ([0.9, 1.0, 1.1], rule.HOLDS, rule.FAILS), ([-0.9, -1.0, -1.1], rule.FAILS, rule.FAILS),
    ([-1.0, 0.0, 1.0], rule.OPEN, rule.OPEN), ([0.01, -0.01, 0.0], rule.OPEN, rule.HOLDS),
    ([5.0, 5.0], rule.OPEN, rule.OPEN), ([0.4, np.nan, 0.4], rule.OPEN, rule.OPEN)])
def test_what_holds(values, above, within):
    assert rule.above(values) == above and rule.within(values, 0.1) == within


@given(figures, st.floats(-1, 1))
def test_a_claim_and_its_contrary_never_both_hold(values, bound):
    both = {rule.above(values, bound), rule.below(values, bound)}
    assert both in ({rule.HOLDS, rule.FAILS}, {rule.OPEN})


def test_one_part_that_fails_refutes_a_claim():
    assert rule.together([rule.HOLDS, rule.FAILS, rule.OPEN]) == rule.FAILS
    assert rule.together([rule.HOLDS, rule.OPEN]) == rule.OPEN
    assert rule.together([rule.HOLDS] * 2) == rule.HOLDS and rule.together([]) == rule.OPEN


# --- What is run ---


@pytest.mark.parametrize(('suite', 'experiment'), [
    (suite, e) for suite in suites.SUITES.values() for e in suite.experiments],
    ids=lambda e: getattr(e, 'name', ''))
@pytest.mark.parametrize('quick', [False, True])
def test_every_experiment_is_a_valid_config(suite, experiment, quick):
    config = tiny.load_config('emoji')
    config.update_from_flattened_dict(suites.fields(suite, experiment, config, quick, 2))
    assert config_lib.validate(config) == [] and config.seed == 2


@pytest.mark.parametrize('experiment', [e for e in suites.PAPER if e.name not in (
    'ca_mv', 'ca_gan')], ids=lambda e: e.name)
def test_the_suite_is_one_flag_away_for_another_teacher(experiment):
    """Not those that need real data, which the embedded teacher alone comes with."""
    config = tiny.load_config('lumina')
    config.update_from_flattened_dict(
        suites.fields(suites.SUITES['paper'], experiment, config, False, 0))
    assert config_lib.validate(config) == []


@pytest.mark.parametrize('suite', claims.CLAIMS)
def test_claims_ask_for_experiments_that_there_are(suite):
    known = {e.name for e in suites.SUITES[suite].experiments}
    for claim in claims.judge({}, suite):
        assert set(claim.shows) <= known and claim.parts
        assert claim.verdict == rule.OPEN
        for part in claim.parts:
            assert set(re.findall(r'(\w+) - (\w+)', part.figure)[0:1]) <= {
                (a, b) for a in known for b in known}


# --- What is read off ---


def result(match=0.9, frechet=1.0, std=1.0, contrast=1.0, low=0.5, cos=0.0, share=0.5,
           x_std=(0.4, 0.41, 0.42)):
    row = {'all_match': match, 'all_match_held_out': match, 'frechet': frechet,
           'colour_error': 1.0, 'std': 0.5, 'diversity': None}
    return {'fields': {}, 'student': row | {'std': 0.5 * contrast}, 'real': row,
            'few_step': row | {'frechet': 0.6, 'std': 0.4}, 'start': row | {'frechet': 0.7},
            'figures': {'std_ratio': std, 'bands_live': [low, 0.2, 0.3], 'observer_cos': cos,
                        'guided_share': share},
            'curves': {'step': [5, 10, 15], 'x_std': list(x_std), 'ema_match': [0.9, 0.9, 0.9],
                       'ema_image_std': [0.5, 0.5, 0.5], 'dm_rel_gap': [0.0, 0.1, 0.2]}}


def made_up(**changed):
    """Results in which the paper is right, but for what is changed; seeds differ a little."""
    is_so = {
        'hybrid': {}, 'dm_only': {'share': 0.1, 'std': 1.2, 'contrast': 1.01},
        'ca_only': {'std': 1.6, 'cos': -0.3, 'frechet': 6.0, 'share': 0.8},
        'ca_mv': {'std': 1.1, 'frechet': 2.0}, 'ca_gan': {'std': 1.2},
        'coupled_shared': {'frechet': 3.0}, 'decoupled_full': {'frechet': 3.1},
        'decoupled_constrained': {'frechet': 2.0},
        'one_step_all': {'frechet': 2.0}, 'one_step_clean': {'frechet': 9.0, 'low': 0.1},
        'one_step_noisy': {'low': 0.8}}
    is_so |= changed
    jitter = lambda seed, values: {k: v + 0.001 * seed if isinstance(v, float) else v
                                   for k, v in values.items()}
    return {name: {seed: result(**jitter(seed, values)) for seed in range(3)}
            for name, values in is_so.items()}


def test_where_the_paper_is_right_every_claim_holds():
    assert [c.verdict for c in claims.judge(made_up())] == [rule.HOLDS] * 6


def made_up_steps(**changed):
    """Likewise of students of few steps: as good as wanted, but for what is changed."""
    rows = {'guided': {'all_match': 0.9, 'all_match_held_out': 0.9, 'colour_error': 1.5},
            'few_step': {'all_match': 0.4, 'all_match_held_out': 0.4, 'frechet': 30.0}}
    is_so = {f'hybrid_{k}': {'frechet': 10.0} for k in (1, 2, 4, 8)}
    is_so |= {f'dmd2_{k}': {'frechet': 20.0} for k in (1, 2, 4, 8)}
    is_so |= dict.fromkeys(('lora16_4', 'lora32_4', 'apart5_4', 'rollout5_4'), {'frechet': 10.0})
    found = {}
    for name, values in (is_so | changed).items():
        made = result(match=values.get('match', 0.9), frechet=values.get('frechet', 10.0),
                      contrast=values.get('contrast', 1.0))
        made['student']['colour_error'] = values.get('colour', 1.0)
        found[name] = {seed: {**made, **{k: made[k] | row for k, row in rows.items() if k in made},
                              'guided': rows['guided']} for seed in range(3)}
    return found


def test_where_students_are_as_wanted_every_claim_of_steps_holds():
    judged = claims.judge(made_up_steps(), 'steps')
    assert [c.verdict for c in judged] == [rule.HOLDS] * 5
    assert all(part.values for claim in judged for part in claim.parts)  # of runs that there are


@pytest.mark.parametrize(('number', 'changed'), [
    (1, {'hybrid_4': {'match': 0.8}}), (1, {'hybrid_4': {'colour': 1.6}}),
    (1, {'hybrid_4': {'contrast': 1.1}}), (1, {'hybrid_4': {'contrast': 0.9}}),
    (2, {'hybrid_4': {'match': 0.5}}), (2, {'hybrid_4': {'frechet': 16.0}}),
    (2, {'hybrid_1': {'match': 0.7}}), (3, {'dmd2_2': {'frechet': 9.0}}),
    (4, {'lora32_4': {'frechet': 13.0}}), (4, {'lora16_4': {'match': 0.8}}),
    (5, {'rollout5_4': {'frechet': 13.0}}), (5, {'rollout5_4': {'match': 0.8}})])
def test_where_students_are_not_the_claim_of_steps_does_not_hold(number, changed):
    assert claims.judge(made_up_steps(**changed), 'steps')[number - 1].verdict == rule.FAILS


@pytest.mark.parametrize(('number', 'changed'), [
    (1, {'ca_only': {'std': 0.9, 'cos': -0.3}}), (2, {'dm_only': {'share': 0.7}}),
    (2, {'dm_only': {'share': 0.1, 'contrast': 1.3}}), (3, {'ca_mv': {'std': 1.1, 'frechet': 0.5}}),
    (4, {'one_step_noisy': {'low': 0.05}}), (5, {'ca_only': {'cos': 0.4, 'std': 1.6}}),
    (6, {'decoupled_full': {'frechet': 9.0}})])
def test_where_the_paper_is_wrong_the_claim_does_not_hold(number, changed):
    assert claims.judge(made_up(**changed))[number - 1].verdict == rule.FAILS


def test_a_run_that_broke_off_has_no_figures_and_is_told(tmp_path):
    results = made_up()
    results['ca_only'][1] = {'fields': {}, 'failed': 'main: step 7: NaN or Inf in loss'}
    first = claims.judge(results)[0]
    assert set(first.parts[0].values) == {0, 2} and first.verdict == rule.OPEN
    # Its curve, which rose until then, is no evidence; nor are the seeds that came through.
    results['ca_only'][1]['curves'] = {'step': [5, 10], 'x_std': [0.4, 0.5], 'health': ['a', 'b']}
    results['ca_only'][3] = results['ca_only'][0]
    assert [set(part.values) for part in claims.judge(results)[0].parts[:2]] == [{0, 2, 3}] * 2
    assert {part.verdict for part in claims.judge(results)[0].parts} == {rule.OPEN}
    claims_page.write(tmp_path / 'r.html', 'T', 'H', 'how', results,
                      suites.SUITES['paper'], {})
    assert 'ca_only, seed 1: main: step 7: NaN or Inf in loss' in (tmp_path / 'r.html').read_text()


def test_bands_share_out_the_power_of_a_change():
    x = np.arange(24)
    slow, fast = (np.broadcast_to(np.cos(2 * np.pi * k * x / 24)[None, :, None, None],
                                  (2, 24, 24, 3)) for k in (1, 11))
    assert examine.band_shares(slow) == pytest.approx([1, 0, 0], abs=1e-9)
    assert examine.band_shares(fast) == pytest.approx([0, 0, 1], abs=1e-9)
    noise = np.random.default_rng(0).normal(size=(8, 24, 24, 3))
    assert sum(examine.band_shares(noise)) == pytest.approx(1)


def test_cosines_are_of_each_sample():
    a = np.random.default_rng(0).normal(size=(4, 3, 3, 2))
    scale = np.array([1.0, 5.0, 0.1, 2.0])[:, None, None, None]
    assert examine.cosine(a, a * scale) == pytest.approx(1)
    assert examine.cosine(a, -a) == pytest.approx(-1)
    assert examine.cosine(a, np.zeros_like(a)) == 0
    assert examine.share_of_way(0.3 * a, a) == pytest.approx(0.3)
    assert examine.share_of_way(-a, a * scale) < 0


def test_the_table_has_real_images_and_the_teacher_once_a_seed():
    row = lambda steps, w, share: {'steps': steps, 'guidance': w, 'all_match': share}
    run = lambda student, guided: {'student': row(4, 1.0, student), 'few_step': row(4, 1.0, 0.5),
                                   'guided': guided, 'real': row(None, None, 1.0)}
    found = {'hybrid_4': {1: run(0.9, row(50, 2.0, 0.8)), 2: run(0.7, row(50, 2.0, 0.8))},
             'dmd2_4': {1: run(0.6, row(1, 1.0, 0.0))}}
    lines = claims_page.markdown(found, suites.SUITES['steps']).splitlines()
    cells = [[cell.strip() for cell in line.split('|')[1:5]] for line in lines[2:]]
    assert cells == [
        ['real images', '', '2', '1.000 ± 0.000'],
        ['teacher, guided, w = 2', '50', '2', '0.800 ± 0.000'],
        ['teacher, without guidance', '4', '2', '0.500 ± 0.000'],
        ['teacher, without guidance', '1', '1', '0.000'],
        ['hybrid_4', '4', '2', '0.800 ± 0.141'], ['dmd2_4', '4', '1', '0.600']]


def test_the_page_stands_alone_and_says_what_was_found(tmp_path):
    path = tmp_path / 'report.html'
    claims_page.write(path, 'A <title>', 'Of 3 seeds.', 'python -m ddmd_jax.study', made_up(),
                      suites.SUITES['paper'], {})
    page = path.read_text()
    assert '<h1>A &lt;title&gt;</h1>' in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count('<h2 id="claim') == 6 and page.count('class="v holds"') >= 6 + 18
    assert page.count('data:image/png;base64') == 6  # a figure of curves for each claim
    assert '0.900 ± 0.000' in page or '0.901 ± 0.001' in page
    assert rule.RULE.split('.')[0] in page
    table = (tmp_path / 'table.md').read_text()
    assert '| hybrid | ' in table and table.count('| holds |') == 17
    assert '| 5. An observer sees what DM would cancel | ' in table


# --- Going on ---


def planned(folder, **fields):
    return trials.Trial(suites.PAPER[0], 0, folder,
                        {'seed': 0, 'method.tau_ca': (0.0, 0.5)} | fields)


def test_a_result_counts_for_the_fields_it_was_made_with(tmp_path):
    (tmp_path / 'results').mkdir()
    run = planned(tmp_path)
    assert not run.done
    write = lambda **more: run.result.write_text(json.dumps(
        {'fields': trials.plain(run.fields), **more}))
    write()
    assert run.done and not planned(tmp_path, seed=1).done
    write(failed='main: step 3: NaN or Inf in loss; ...')
    assert run.done  # it is what came of it
    write(failed='main: no space left')
    assert not run.done
    write(data_std=None)  # a teacher that does not know its latents' contrast
    assert run.done


def test_a_run_that_was_begun_with_other_fields_is_begun_anew(tmp_path):
    """Its checkpoint is another run's; one of the same fields goes on."""
    (tmp_path / 'results').mkdir()
    for fields, left in (({}, False), ({}, True), ({'train.steps': 7}, False)):
        run = planned(tmp_path, **fields)
        mark = run.workdir / 'begun'
        assert not left or mark.is_file()
        trials.perform([run], 'configs/no.py', 1, lambda line: None, keep=False)
        assert 'failed' in files.read_one(run.result) and mark.is_file() == left
        mark.touch()


@pytest.mark.parametrize(('flags', 'line'), [
    ((), '--config and --workdir are needed'),
    (('--config=configs/emoji.py', '--workdir=x', '--suite=papr'),
     "no suite 'papr'; known: paper, steps, robustness"),
    (('--config=configs/emoji.py', '--workdir=x', '--only=ca'),
     "no experiment 'ca'; known: hybrid"),
    (('--config=configs/lumina.py', '--workdir=x', '--suite=robustness', '--set',
      'teacher.path=p', '--set', 'data.path=q'), "suite 'robustness' needs log.judge above 0"),
    (('--config=configs/emoji.py', '--workdir=x', '--suite=robustness', '--seeds=2'),
     "suite 'robustness' takes one seed"),
    (('--config=configs/no.py', '--workdir=x'), '--config configs/no.py cannot be read'),
    (('--config=configs/emoji.py', '--workdir=x', '--set', 'lr'), "--set 'lr' is not field=value"),
])
def test_wrong_flags_are_one_line(flags, line):
    done = forked.run('ddmd_jax.study', *flags)
    assert done.returncode == 2 and done.stderr.startswith(f'study: {line}'), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_results_of_other_fields_are_left_out_and_told(tmp_path):
    (tmp_path / 'results').mkdir()
    suite, config = suites.SUITES['paper'], tiny.load_config('emoji')
    for name, changed in (('hybrid', {}), ('dm_only', {'train.steps': 7})):
        (experiment,) = suites.chosen(suite, False, (name,))
        fields = suites.fields(suite, experiment, config, False, 0) | changed
        (tmp_path / 'results' / f'{name}-seed0.json').write_text(
            json.dumps(result() | {'fields': fields}))
    done = forked.run('ddmd_jax.study', '--config=configs/emoji.py', f'--workdir={tmp_path}',
                      '--report_only')
    assert done.returncode == 0, done.stderr
    assert done.stderr == ('study: warning: dm_only, seed 0, was made with other fields and is '
                           'left out\n')
    assert ', 1 runs.' in (tmp_path / 'report.html').read_text()


SMALLEST = ('train.steps=2', 'data.global_batch=4', 'student.steps=2', 'critic.updates=1',
            'mesh.data=1', 'mesh.fsdp=2', 'log.every=1', 'log.judge=3', 'log.report=false',
            'log.probe=0', 'eval.prompts=3', 'eval.held_out=3', 'eval.batch=6')


def command(folder, weights, *flags):
    return ['ddmd_jax.study', '--config=configs/emoji.py',
            f'--workdir={folder}', '--only=ca_gan', '--seeds=1', *flags,
            *(x for field in (f'teacher.path={weights}', *SMALLEST) for x in ('--set', field))]


@pytest.mark.slow
def test_the_smallest_study_is_stopped_goes_on_and_is_reported(tmp_path, weights, monkeypatch):
    """Two steps a run, a toy teacher on two devices: through `main`, as for any other."""
    monkeypatch.setenv('XLA_FLAGS', tiny.xla_flags(2))
    first = forked.start(*command(tmp_path, weights))
    while not (tmp_path / 'runs' / 'ca_gan-seed1' / 'lock').exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 1 and 'run the same command to go on' in err
    done = forked.run(*command(tmp_path, weights))
    assert done.returncode == 0, done.stderr
    assert '1 of 1 runs to do' in done.stderr
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / 'results').glob('*.json')}
    assert set(found) == {'ca_gan-seed1'}
    one = found['ca_gan-seed1']
    assert 'failed' not in one, one
    assert one['curves']['step'] == [1, 2] and -1 <= one['figures']['observer_cos'] <= 1
    assert sum(one['figures']['bands_live']) == pytest.approx(1, abs=1e-6)
    assert 'gan_loss' in one['curves']
    page = (tmp_path / 'report.html').read_text()
    assert 'alt="ca_gan"' in page and 'not decided at this scale' in page
    assert not (tmp_path / 'runs' / 'ca_gan-seed1').exists()  # only results are kept
    again = forked.run(*command(tmp_path, weights))
    assert again.returncode == 0 and '0 of 1 runs to do' in again.stderr


