"""Several processes are one run: the same data, losses, weights and pictures as one process has.

``python tests/test_distributed.py PORT 0`` and ``... PORT 1`` read data by hand.
"""

import json
import os
import socket
import sys

import forked
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.data.prompts import build as prompts
from ddmd_jax.parallel import distributed, sharding


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def together(commands, code=0, **environ):
    """Outputs of commands that run at once, eight devices split over them.

    Each has its own of a list in `environ`.
    """
    started = [forked.start(
        *command, XLA_FLAGS=tiny.xla_flags(8 // len(commands)),
        **{k: v[i] if isinstance(v, list) else v for k, v in environ.items()})
        for i, command in enumerate(commands)]
    outputs = [''.join(p.communicate(timeout=600)) for p in started]
    assert [p.returncode for p in started] == [code] * len(commands), '\n'.join(outputs)
    return outputs


def under_slurm():
    """What Slurm tells each of two tasks of one job on this machine."""
    return {'SLURM_JOB_ID': str(os.getpid() % 4096), 'SLURM_NTASKS': '2',  # makes JAX's port
            'SLURM_STEP_NODELIST': 'localhost', 'SLURM_PROCID': ['0', '1'],
            'SLURM_LOCALID': ['0', '1']}


def run(workdir, weights, processes):
    """`main` on eight devices, split over this many processes; their joined output.

    Prompts are encoded on the mesh, and cut to their lengths.
    """
    fields = {
        'teacher.path': weights, 'data.path': weights.with_name('prompts'),
        'data.lengths': '(4, 10)', 'train.steps': 5, 'data.global_batch': 16,
        'student.steps': 2, 'critic.updates': 1, 'mesh.data': 2, 'mesh.fsdp': 2,
        'mesh.tensor': 2, 'checkpoint.every': 3, 'log.every': 1, 'log.images_every': 100,
        'log.probe': 3, 'eval.prompts': 3, 'eval.held_out': 3, 'eval.batch': 4,
        'eval.teacher_steps': 2, 'optim.student.lr': 1e-3, 'optim.critic.lr': 1e-3}
    flags = [f'--config.{name}={value}' for name, value in fields.items()]
    port, commands = free_port(), []
    for i in range(processes):
        join = [] if processes == 1 else [
            f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={i}']
        commands.append(['ddmd_jax.main', '--config=configs/emoji_prompts.py',
                         f'--workdir={workdir}', *flags, *join])
    return together(commands)


def lines(workdir):
    return [json.loads(x) for x in (workdir / 'metrics.jsonl').read_text().splitlines()]


def state_of(workdir):
    """The last state as numpy arrays: this process has not the devices that wrote it."""
    reader, folder = ocp.PyTreeCheckpointer(), workdir / 'checkpoints' / '5' / 'state'
    tree = reader.metadata(folder).item_metadata.tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=kinds))


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """One test, as its two runs take minutes and pytest's workers share no fixture."""
    tiny.save_toy(tmp_path)
    (tmp_path / 'p.txt').write_text(''.join(
        f'{word} apple{" on a blue background" * long}\n'
        for word in ('red', 'green', 'blue', 'old', 'two', 'big') for long in (0, 1)))
    prompts.prepare(prompts.Settings((str(tmp_path / 'p.txt'),), near_threshold=1.0,
                                     validation=0.0), tmp_path / 'prompts')
    workdirs = tmp_path / '1', tmp_path / '2'
    for processes, workdir in enumerate(workdirs, 1):
        run(workdir, tmp_path / 'toy.safetensors', processes)

    # They train and log as one.
    one, two = map(lines, workdirs)
    assert [x['step'] for x in one] == [x['step'] for x in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        numbers = [k for k, v in a.items() if not isinstance(v, str)]
        np.testing.assert_allclose([a[k] for k in numbers], [b[k] for k in numbers],
                                   rtol=1e-3, atol=1e-5, err_msg=str(a['step']))

    # They end with the weights of one; the checkpoint that two wrote is read by one.
    one, two = map(state_of, workdirs)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one['student'], one['ema'])
    assert max(jax.tree.leaves(moved)) > 1e-4  # it trained at all
    for part in ('student', 'critic', 'ema'):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
                     one[part], two[part])

    # They evaluate as one.
    one, two = (json.loads((w / 'eval.json').read_text())['rows'] for w in workdirs)
    for a, b in zip(one, two, strict=True):
        assert a['name'] == b['name']
        assert a['std'] == pytest.approx(b['std'], rel=1e-3)
    assert (workdirs[1] / 'samples.png').stat().st_size > 1000


# --- The order of the data ---


def read(port, process):
    """What the test below runs twice: a line per batch, ``[first place, rows]`` per device.

    On three meshes: as the devices come; in a ring, so that a process has the first and the last
    rows; and with a tensor axis over both processes, so that they have the same.
    """
    distributed.start(f'127.0.0.1:{port}', 2, int(process), {'JAX_PLATFORMS': 'cpu'})
    devices = jax.devices()
    plain = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    ring = sharding.make_mesh({'data': 1, 'fsdp': 8}, np.roll(devices, 2).tolist())
    across = sharding.make_mesh(
        {'fsdp': 4, 'tensor': 2}, np.reshape(devices, (2, 4)).T.flatten().tolist())
    for mesh in (plain, ring, across):
        data = loader.batches(Order(np.arange(40), 16, 0), lambda planned: planned.rows,
                              sharding.rows_here(mesh, 16))
        for _ in range(5):
            batch = sharding.put_batch(next(data), mesh, 16)
            assert batch.shape == (16,)
            print('read', json.dumps([(shard.index[0].start or 0, np.asarray(shard.data).tolist())
                                      for shard in batch.addressable_shards]))


@pytest.mark.slow
def test_processes_read_the_prompts_of_one_in_its_order_on_any_mesh():
    port = free_port()
    outputs = together([[__file__, port, i] for i in range(2)])
    read_by = [[json.loads(line.removeprefix('read ')) for line in output.splitlines()
                if line.startswith('read ')] for output in outputs]
    one = Order(np.arange(40), 16, 0)
    for i, (a, b) in enumerate(zip(*read_by, strict=True)):
        want, places = one[i % 5].rows, set()
        for first, rows in a + b:
            np.testing.assert_array_equal(rows, want[first:first + len(rows)])
            places |= {*range(first, first + len(rows))}
        assert places == {*range(16)}  # between them, the whole batch
        firsts = [{first for first, _ in part} for part in (a, b)]
        assert firsts[0] == firsts[1] if i >= 10 else firsts[0].isdisjoint(firsts[1])
        if 5 <= i < 10:  # the ring: one process has a hole in the middle of its rows
            assert any({0, 14} <= part for part in firsts)
    assert len(read_by[0]) == 15


# --- What says that there are several ---


@pytest.mark.parametrize('environ, found', [
    ({}, None),
    ({'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}, 'Slurm'),
    ({'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, None),  # a job of one task
    ({'SLURM_NTASKS': '4'}, None),  # the batch script itself, outside srun
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'Open MPI'),
    ({'JAX_COORDINATOR_ADDRESS': 'host:1'}, 'JAX_COORDINATOR_ADDRESS'),
])
def test_the_environment_is_read(environ, found):
    assert distributed.launcher_in({'JAX_PLATFORMS': 'cpu'} | environ) == found


@pytest.mark.parametrize('libtpu, found', [(True, 'TPU'), (False, None)])
def test_a_device_that_is_passed_through_is_no_tpu(monkeypatch, libtpu, found):
    monkeypatch.setattr(distributed.glob, 'glob', lambda pattern: (
        ['/dev/vfio/0'] if 'vfio' in pattern else []))
    monkeypatch.setattr(distributed.importlib.util, 'find_spec', lambda name: libtpu or None)
    assert distributed.launcher_in({}) == found
    assert distributed.launcher_in({'TPU_LIBRARY_PATH': '/usr/lib/libtpu.so'}) == 'TPU'


@pytest.mark.parametrize('flags, words', [
    (('host:1', None, None), '--num_processes, --process_id not given'),
    ((None, 2, 0), '--coordinator not given'),
    (('host:1', 2, 2), '--process_id 2 must lie in 0..1'),
])
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(distributed.DistributedError, match=words) as e:
        distributed.start(*flags, environ={})
    assert len(str(e.value).splitlines()) == 1


def test_one_process_alone_is_left_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *a: pytest.fail('started'))
    distributed.start(None, None, None, {'JAX_PLATFORMS': 'cpu'})


if __name__ == '__main__':
    read(*sys.argv[1:])
