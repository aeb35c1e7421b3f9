"""What all processes of a run must share is compared before anything is done with it."""

import textwrap

import forked
import pytest
from test_distributed import free_port

JOIN = """
import os, sys, time
from pathlib import Path
from etils import epath
from ddmd_jax.parallel import distributed
from ddmd_jax.util.errors import UserError

port, me = sys.argv[1], int(sys.argv[2])
distributed.SEEN = 1
distributed.start(f'127.0.0.1:{port}', 2, me, os.environ)
try:
    CHECK
    print('agreed', flush=True)
    time.sleep(float(sys.argv[3]))
except UserError as e:
    distributed.fail(str(e))
"""


def ran(folder, check, stay=0):
    """[(exit code, output) of process 0, of process 1], which do `check` and stay so many s."""
    port, script = free_port(), folder / 'join.py'
    script.write_text(JOIN.replace('CHECK', textwrap.indent(check, '    ').strip()))
    started = [forked.start(script, port, me, stay) for me in (0, 1)]
    return [(p.wait(timeout=120), ''.join(p.communicate())) for p in started]


def test_processes_that_agree_go_on(tmp_path):
    file = tmp_path / 'lock'
    for code, output in ran(tmp_path, f"""
distributed.agree('config', {{'seed': 3, 'method.alpha': 1.5}})
file = Path({str(file)!r})
if me == 0:
    file.write_text('held by 0')
distributed.same_folder(file)
distributed.same_folder(epath.Path('gs://bucket/run/lock'))  # nobody asks the bucket
distributed.agree('teacher or data', {{'teacher_identity': 'abc'}})
"""):
        assert code == 0 and 'agreed' in output


@pytest.mark.parametrize('check, words', [
    ("distributed.agree('config', {'seed': me, 'method.alpha': 1.5, **({'x': 1} if me else {})})",
     "process 1 has another config than process 0: seed: 0, here 1; x: absent, here 1; start all"),
    ("distributed.agree('teacher or data', {'data_identity': 'ab'[me]})",
     "process 1 has another teacher or data than process 0: data_identity: 'a', here 'b'"),
    ("file = Path(f'FOLDER/{me}/lock')\n"
     "file.parent.mkdir(exist_ok=True)\n"
     "file.write_text(f'held by {me}')\n"
     "distributed.same_folder(file)",
     'process 1 sees another FOLDER/1 than process 0; --workdir must be one folder'),
    ("distributed.same_folder(epath.Path(f'gs://bucket/{me}/lock'))",
     "process 1 has another folder than process 0: --workdir: 'gs://bucket/0', here 'gs://bucket/1'"),
])
def test_what_differs_is_named_by_the_process_that_has_it(tmp_path, check, words):
    (zero, said_0), (one, said_1) = ran(tmp_path, check.replace('FOLDER', str(tmp_path)), 90)
    assert zero == one == 1
    (line,) = [x for x in said_1.splitlines() if x.startswith('main:')]
    assert words.replace('FOLDER', str(tmp_path)) in line
    assert 'process 1 has failed (its own output says why)' in said_0
