"""A distillation's programs for a TPU topology: from shapes, without a TPU and without weights."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddmd_jax import families as teachers
from ddmd_jax.data.batch import Batch
from ddmd_jax.diffusion import drawing
from ddmd_jax.method import schedules
from ddmd_jax.parallel import sharding
from ddmd_jax.planner import chips
from ddmd_jax.train import distillation, prompts
from ddmd_jax.train.watch.student import GRID
from ddmd_jax.util import errors, text
from ddmd_jax.util.errors import UserError


class PlanError(UserError):
    """A topology that cannot be compiled for."""


SLICES = 1024  # each of up to thousands of chips, which all are described


def topology(name: str) -> Any:
    """The devices of a TPU topology such as ``v5e:4x4``; needs libtpu, not a TPU.

    ``2xv5e:4x4`` is two such slices, joined by the slower network between them.

    Raises:
      PlanError: unknown topology, or no libtpu.
    """
    from jax.experimental import topologies

    # libtpu would look for a TPU's metadata, and for the lock that a program on one holds.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    slices, shape = chips.split_slices(name)
    if slices > SLICES:
        raise PlanError(f'no topology {name!r}: at most {SLICES} slices are planned for')
    more = {'chip_config_name': 'megacore'} if shape.startswith('v4') else {}
    try:
        return topologies.get_topology_desc(
            platform='tpu', topology_name=shape, num_slices=slices, **more).devices
    except Exception as e:  # a missing library and a misspelt name come as many kinds
        errors.raise_environment(e)
        reason = text.first_line(e)
        raise PlanError(f'no topology {name!r} ({reason}); write it as v5e:4x4, several slices as '
                        '2xv5e:4x4, and install the TPU compiler with `pip install "jax[tpu]"`'
                        ) from e


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of one device for a tree of shapes."""
    part = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings)))


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a distillation, to be compiled.

    Attributes:
      lower: traces it for the topology.
      beside: bytes a chip holds while it runs, other than its outputs and temporaries.
      analytic_flops: per chip, by the architecture: forward passes, and a backward pass as two;
        None where a family does not say.
      rows: pictures of one run, over all chips.
    """

    lower: Callable[[], Any]
    beside: int
    analytic_flops: int | None
    rows: int


def in_device_memory(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree, leaving out what is in its host's memory."""
    here = jax.tree.map(lambda s: s.memory_kind != 'pinned_host', shardings)
    part = lambda x, s, counts: bytes_per_device(x, s) if counts else 0
    return sum(jax.tree.leaves(jax.tree.map(part, tree, shardings, here)))


def evaluations(config: Any) -> dict[str, float]:
    """Network evaluations of a row in each program of a step, without those of a gradient.

    Of N student steps a row has (N - 1) / 2 simulated on average (`sampling.student_inputs`). The
    generator's step has the student's, the teacher's two or three and the critic's; the critic's
    has the student's and the critic's, and alone the critic's where the samples are there: with
    'same_images' those of the generator's step, for one update; with 'one_rollout' the student's
    N, which have a program of their own, so that a gradient alone asks the student again.
    """
    steps, order = config.student.steps, config.critic.get('order')
    teacher = 2 if schedules.get(config.method.schedule).shared else 3
    if order == 'one_rollout':
        return {'rollout': steps, 'generator_step': 1 + teacher + 1, 'critic_step': 1}
    simulated = (steps - 1) / 2
    return {'generator_step': simulated + 1 + teacher + 1,
            **({'critic_on_images': 1} if order == 'same_images' else {}),
            'critic_step': simulated + 1 + 1}


def passes(config: Any) -> dict[str, float]:
    """`evaluations` with those of the gradients, a backward pass counted as two."""
    return {name: count + 2 * (name != 'rollout') for name, count in evaluations(config).items()}


def runs(config: Any) -> dict[str, int]:
    """How often each program of a step runs in it."""
    names = evaluations(config)
    return dict.fromkeys(names, 1) | {
        'critic_step': config.critic.updates - ('critic_on_images' in names)}


def programs(config: Any, teacher: teachers.Teacher, mesh: Mesh, tokens: int,
             text: teachers.TextEncoder | None = None) -> tuple[dict[str, Program], int]:
    """(A distillation's programs, bytes that stay on a chip between them).

    These are the generator's step, the critic's, that on the generator's images or the rollout
    where `critic.order` has one, the sampling of pictures during the run; where the teacher has a
    decoder, the decoding of one; and where prompts are encoded on the mesh, the encoding of a
    batch. Student, critic, EMA, both optimisers' moments, teacher, decoder and text encoder stay,
    but for those that `train.offload` keeps in host memory.

    Args:
      config: of a distillation.
      teacher: with shapes or arrays as parameters.
      mesh: over the topology's devices.
      tokens: length of a caption.
      text: the text encoder, if there is to be one, likewise.
    """
    cond = lambda rows: teacher.cond.shapes(rows, tokens, jnp.bfloat16)
    p = distillation.plan(config, teacher, cond(1), mesh)
    state, frozen = p.spec.shapes, jax.eval_shape(lambda: p.frozen)
    decoder = teacher.latents.decoder
    resident = (in_device_memory(state, p.spec.shardings)
                + in_device_memory(frozen, p.frozen_shardings)
                + (in_device_memory(decoder.params, decoder.shardings) if decoder else 0))
    if text:
        encode, text_layout = prompts.encoder_program(text, mesh)
        resident += in_device_memory(text.params, text_layout)
    rows, drawn = config.data.global_batch, drawing.filled(GRID, mesh)
    real = jax.ShapeDtypeStruct((rows, *teacher.latents.shape), jnp.float32)
    batch = Batch(cond(rows), real if any(
        r.needs_real for r in p.recipe.regularisers.values()) else None, teacher.latents.shape)
    split = jax.tree.map(lambda _: sharding.batch_sharding(mesh), cond(1))
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), cond(1))
    words = jax.ShapeDtypeStruct((drawn, 3), jnp.uint32, sharding=sharding.batch_sharding(mesh))
    with_batch = resident + bytes_per_device(cond(rows), split)
    once, count = teacher.flops(tokens) if teacher.flops else None, passes(config)
    begun, made = (dataclasses.replace(batch, **{name: batch.latents}) for name in 'zx')
    steps = {'generator_step': (p.program.generator, batch),
             'critic_step': (p.program.critic, batch),
             'critic_on_images': (p.program.critic, made)}
    if 'rollout' in count:
        steps = {'generator_step': (p.program.generator, begun),
                 'critic_step': (p.program.critic, made), 'rollout': (p.program.rollout, batch)}
        held = [batch.latents] * (1 + config.student.steps)
        with_batch += bytes_per_device(held, [sharding.batch_sharding(mesh)] * len(held))
    share = lambda rows, cost: None if cost is None else int(rows * cost) // mesh.size
    judged = [r.flops(tokens) for r in p.recipe.regularisers.values()]

    def flops(name: str) -> float | None:
        if once is None or None in judged:
            return None
        of_student, of_critic = (sum(costs[i] for costs in judged) for i in (0, 1))
        return once * count[name] + {'generator_step': of_student, 'rollout': 0}.get(
            name, of_critic)

    sampler = drawing.program(drawing.of_student(
        teacher, config.student.steps, p.recipe.steps.time, config.student.sampler), mesh, GRID)
    found = {name: Program(functools.partial(program.lower, frozen, state, given), with_batch,
                           share(rows, flops(name)), rows)
             for name, (program, given) in steps.items() if name in count}
    found['sample'] = Program(
        lambda: sampler.lower(p.student.bind(placed(frozen.teacher, p.frozen_shardings.teacher),
                                             placed(state.ema, p.spec.shardings.ema)),
                              placed(cond(drawn), split), placed(cond(1), whole), words),
        resident + bytes_per_device(cond(drawn), split),
        share(drawn * config.student.steps, once), drawn)
    if decoder:
        latents = placed(decoder.latents, sharding.replicated(mesh))
        found['decode'] = Program(
            lambda: decoder.run.lower(placed(decoder.params, decoder.shardings), latents),
            resident + bytes_per_device(latents, latents.sharding), decoder.flops, 1)
    if text:
        ids = placed({**dict.fromkeys(text.ids, jax.ShapeDtypeStruct((rows, tokens), jnp.int32)),
                      'mask': jax.ShapeDtypeStruct((rows, tokens), bool),
                      **teacher.cond.of_shape(rows, teacher.latents.shape)},
                     sharding.batch_sharding(mesh))
        found['encode'] = Program(
            lambda: encode.lower(placed(text.params, text_layout), ids), with_batch,
            share(rows, text.flops(tokens) if text.flops else None), rows)
    return found, resident


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes that say where their arrays would lie."""
    shardings = jax.tree.broadcast(shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                        shardings)
