"""Self-test of the present device: the numerics that differ by device, in a minute.

    python -m benchmarks.accelerator.selftest --out=OUT

Attention by every kind that runs here against XLA's on the CPU in fp32, values and gradients; an
update by both programs of a tiny Lumina against the CPU's; the same network in bf16; arrays in
host memory. Leaves OUT/selftest.json: every figure, its limit, and whether it passed (null: not to
be had here). Exits with 1 if one did not.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.accelerator import first_light, record, synthetic
from ddmd_jax import config as config_lib
from ddmd_jax.util import commands, text
from ddmd_jax.util.errors import UserError

STARTED = time.monotonic()
FLAGS = flags.FLAGS
CAPTION, IMAGE = 65, 576  # tokens: together no multiple of anything
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 96  # Lumina's, a quarter of the heads
# Largest difference and its rms, in units of the rms. In fp32 products are of full precision, which
# TF32 would miss by a factor of 50; XLA's own bf16 on a CPU is off by .05 and .003.
LIMITS = {'float32': (2e-5, 5e-6), 'bfloat16': (0.1, 0.02)}
UPDATE_LIMIT = 1e-3  # of metrics, relative; of gradients, the largest difference as above
BF16_LIMIT = 0.05  # rms of what bf16 changes, in units of the rms


def define_flags() -> None:
    flags.DEFINE_string('out', None, 'Folder of the results.')
    flags.DEFINE_float('seconds', 60, 'Not read: it takes what it takes.')


def cpu_beside(device: Any) -> Any:
    """A CPU device to compare with; `device` itself where JAX may use no other platform."""
    import jax

    try:
        return jax.devices('cpu')[0]
    except RuntimeError:
        return device


def off(got: Any, want: Any, scale: float = 0.0) -> tuple[float, float]:
    """(Largest difference, its rms) in units of `want`'s rms, or of `scale` if that is larger."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    rms = lambda x: np.sqrt(np.mean(x**2))
    found = np.array([np.abs(got - want).max(), rms(got - want)]) / max(rms(want), scale)
    most, usual = np.nan_to_num(found, nan=np.inf)
    return float(most), float(usual)


# --- Checks: device -> figures, each with `passed` ---


def padding() -> np.ndarray:
    """Of two rows, an image and its padded caption each."""
    lengths = IMAGE + np.asarray([[9], [50]])
    return np.arange(IMAGE + CAPTION) < lengths


def attention_agrees(device: Any) -> dict[str, Any]:
    """All kinds, types and masks, see `LIMITS`. Queries that are padding do not count.

    A kernel is among them if it is what 'auto' means here; cuDNN's is in bf16 alone.
    """
    import jax
    import jax.numpy as jnp

    from ddmd_jax.models import attention

    rng = np.random.default_rng(0)
    draw = lambda heads: rng.standard_normal(
        (2, IMAGE + CAPTION, heads, HEAD_DIM)).astype(np.float32)
    q, k, v, w = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), draw(HEADS)
    mask = padding()

    @functools.cache
    def program(kind: str, padded: bool) -> Any:
        def weighed(q: Any, k: Any, v: Any) -> Any:
            out = attention.attend(q, k, v, jnp.asarray(mask) if padded else None, kind=kind)
            out = out.astype(jnp.float32) * (mask[:, :, None, None] if padded else 1.0)
            return jnp.sum(out * w), out

        return jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))

    def results(kind: str, padded: bool, inputs: Any, where: Any) -> Any:
        with jax.default_matmul_precision('highest'):
            (_, out), grads = program(kind, padded)(*jax.device_put(inputs, where))
        return dict(zip(('value', 'dq', 'dk', 'dv'), jax.device_get((out, *grads))))

    auto = lambda dtype: attention.resolve('auto', device, dtype, [HEAD_DIM])
    kinds = {dtype: dict.fromkeys(('xla', auto(dtype))) for dtype in LIMITS}
    found, reference = [], cpu_beside(device)
    for dtype, limits in LIMITS.items():
        inputs = [jnp.asarray(x, dtype) for x in (q, k, v)]
        rounded = [x.astype(jnp.float32) for x in inputs]
        for padded in (False, True):
            want = results('xla', padded, rounded, reference)
            for kind in kinds[dtype]:
                got = results(kind, padded, inputs, device)
                figures = {name: off(got[name], want[name]) for name in want}
                found.append({
                    'kind': kind, 'dtype': dtype, 'padded': padded, 'limits': limits, **figures,
                    'passed': all(x <= most for pair in figures.values()
                                  for x, most in zip(pair, limits))})
    ran = dict.fromkeys(x['kind'] for x in found)
    return {'passed': all(x['passed'] for x in found), 'kinds': list(ran), 'cases': found,
            'not_run': [x for x in attention.KINDS if x not in ('auto', *ran)]}


def tiny_subject(device: Any, changes: Mapping[str, Any]) -> synthetic.Subject:
    """A tiny Lumina's distillation on one device."""
    from ddmd_jax.parallel import sharding

    config = config_lib.load('lumina').unlock()
    config.update_from_flattened_dict({**changes, 'mesh.data': 1, 'mesh.fsdp': 1})
    network = synthetic.shrunk(config)
    config_lib.check(config)
    return synthetic.subject(config, sharding.make_mesh({}, [device]), network)


@functools.cache
def fp32_update(device: Any) -> dict[str, Any]:
    """Metrics and gradients, as AdamW's first moments, of one update by each program."""
    import jax
    import optax

    subject = tiny_subject(device, synthetic.FP32)
    programs, _ = first_light.compiled(subject, 'highest')
    state, found = subject.planned.spec.create(), {}
    for kind, program in programs.items():
        state, metrics, *_ = program(subject.planned.frozen, state, subject.batch)
        found |= {f'{kind}: {name}': float(x) for name, x in jax.device_get(metrics).items()}
    mu = lambda opt: jax.device_get(optax.tree_utils.tree_get(opt, 'mu'))
    return {'metrics': found,
            'gradients': {'student': mu(state.student_opt), 'critic': mu(state.critic_opt)}}


def update_agrees(device: Any) -> dict[str, Any]:
    """One update of critic and generator in fp32, here and on the CPU, at the same seed."""
    reference = cpu_beside(device)
    return compared(fp32_update(device), fp32_update(reference)) | {
        'with_itself': device == reference}


def compared(got: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    """Two results of `fp32_update`; see `UPDATE_LIMIT`."""
    import jax

    metrics = {name: abs(got['metrics'][name] - x) / max(abs(x), 1e-3)
               for name, x in want['metrics'].items()}
    gradients = {}
    for name, tree in want['gradients'].items():
        pairs = list(zip(jax.tree.leaves(got['gradients'][name]), jax.tree.leaves(tree)))
        # Gradients that cancel but for rounding have no scale of their own.
        rms = np.sqrt(np.mean(np.concatenate([np.ravel(x) for _, x in pairs]).astype(float) ** 2))
        gradients[name] = max(off(a, b, rms)[0] for a, b in pairs)
    worst = max(metrics, key=lambda name: np.nan_to_num(metrics[name], nan=np.inf))
    return {'passed': all(x <= UPDATE_LIMIT for x in (*metrics.values(), *gradients.values())),
            'limit': UPDATE_LIMIT, 'metrics': metrics[worst], 'metric': worst,
            'gradients': gradients}


def bf16_is_near(device: Any) -> dict[str, Any]:
    """Predictions and gradients of the network in bf16 and in fp32; weights and x_hat are fp32.

    Attention is what 'auto' means for each, mapped over a mesh, as in training.
    """
    import jax
    import jax.numpy as jnp

    from ddmd_jax.families.lumina import teacher as lumina
    from ddmd_jax.models import attention
    from ddmd_jax.models.nextdit import NextDiTConfig

    subject = tiny_subject(device, synthetic.FP32)
    params, batch = subject.planned.frozen.teacher, subject.batch
    x_t = np.random.default_rng(0).standard_normal((batch.rows, *batch.shape)).astype(np.float32)
    t, kinds = np.linspace(0.1, 0.9, batch.rows, dtype=np.float32), {}

    def results(dtype: str) -> tuple[Any, Any]:
        cfg = NextDiTConfig(**synthetic.TINY_NETWORKS['lumina'], dtype=dtype)
        kinds[dtype] = attention.resolve('auto', device, dtype, [cfg.head_dim])
        predict = lumina.make_denoiser(dataclasses.replace(cfg, attention=kinds[dtype]),
                                       subject.planned.spec.mesh)

        def loss(params: Any) -> Any:
            x_hat = predict(params, x_t, t, batch.cond)
            return jnp.mean(jnp.square(x_hat)), x_hat

        with jax.default_matmul_precision('highest'):
            (_, x_hat), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return jax.device_get((x_hat, jax.tree.leaves(grads)))

    (x_hat, grads), (want, wanted) = results('bfloat16'), results('float32')
    whole = lambda leaves: np.concatenate([np.ravel(x) for x in leaves])
    figures = {'x_hat': off(x_hat, want)[1], 'gradients': off(whole(grads), whole(wanted))[1]}
    kept = {str(x.dtype) for x in (x_hat, *grads)}
    return {'passed': 0 < max(figures.values()) <= BF16_LIMIT and kept == {'float32'},
            'limit': BF16_LIMIT, **figures, 'kept': sorted(kept), 'attention': kinds}


def offload_works(device: Any) -> dict[str, Any]:
    """Arrays in the host's pinned memory come to the device inside a program, and go back."""
    import jax

    from ddmd_jax.parallel import sharding

    memories = sorted(m.kind for m in device.addressable_memories())
    if 'pinned_host' not in memories:
        return {'passed': None, 'memories': memories}
    whole = sharding.replicated(sharding.make_mesh({}, [device]))
    host = sharding.in_host_memory(whole)
    x = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    put = jax.device_put(x, host)
    doubled = lambda x: 2 * sharding.on_device(x)
    here, back = (jax.jit(doubled, in_shardings=host, out_shardings=s)(put) for s in (whole, host))
    kinds = [a.sharding.memory_kind for a in (put, here, back)]
    same = all(np.array_equal(2 * x, np.asarray(a)) for a in (here, back))
    return {'passed': same and kinds[::2] == ['pinned_host'] * 2 and kinds[1] != 'pinned_host',
            'memories': memories, 'kinds': kinds}


CHECKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    'attention': attention_agrees, 'offload': offload_works, 'update': update_agrees,
    'bf16': bf16_is_near}


def tested(out: Path, device: Any) -> dict[str, dict[str, Any]]:
    """Figures of all `CHECKS` on `device`, by name; written after each."""
    found: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        begun = time.monotonic()
        try:
            found[name] = check(device)
        except Exception as e:  # a kernel that is refused, say: the other checks count all the same
            found[name] = {'passed': False, 'error': f'{type(e).__name__}: {text.first_line(e)}'}
        found[name]['seconds'] = round(time.monotonic() - begun, 1)
        print(f'{name}: {found[name]}', flush=True)
        record.write(out, 'selftest', found)
    return found


def main(arguments: list[str]) -> None:
    commands.only_flags(arguments)
    commands.need(out='give a folder for the results')
    import jax

    out = commands.folder('--out', FLAGS.out)
    found = tested(out, jax.devices()[0])
    if failed := [name for name, x in found.items() if x['passed'] is False]:
        raise UserError(f'{", ".join(failed)} did not pass; see {out / "selftest.json"}')


if __name__ == '__main__':
    commands.run('selftest', main, define_flags)
