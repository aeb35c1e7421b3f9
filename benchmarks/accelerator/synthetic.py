"""A config's distillation with nothing read: a teacher of random weights, and a random batch.

Shapes are those that the planner compiles for (`Family.abstract`); weights are drawn on the
devices, a leaf at a time, in the layout and the dtypes that a run has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax import config as config_lib, families
from ddmd_jax.data.batch import Batch, Cond
from ddmd_jax.families import LoadOptions, Teacher
from ddmd_jax.models import adapters
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distillation
from ddmd_jax.train.distillation import Plan

# --- At toy size: fields of the network, by family, and of the config ---

TINY_NETWORKS: dict[str, dict[str, Any]] = {
    'lumina': {
        'hidden_size': 64, 'num_layers': 2, 'num_refiner_layers': 1, 'num_attention_heads': 4,
        'num_kv_heads': 2, 'multiple_of': 16, 'axes_dim_rope': (4, 6, 6), 'cap_feat_dim': 24},
    'sdxl': {
        'block_out_channels': (16, 32), 'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D'),
        'up_block_types': ('CrossAttnUpBlock2D', 'UpBlock2D'), 'layers_per_block': 1,
        'transformer_layers_per_block': (1, 1), 'attention_head_dim': (2, 4),
        'cross_attention_dim': 24, 'addition_time_embed_dim': 8,
        'projection_class_embeddings_input_dim': 16 + 6 * 8, 'norm_num_groups': 4},
    'zimage': {'dim': 48, 'n_layers': 2, 'n_refiner_layers': 1, 'n_heads': 2, 'cap_feat_dim': 24,
               'axes_dims': (8, 8, 8)},
}
# Rates at which an update is seen in the next: the critic is the teacher at first, and DM nothing.
TINY_FIELDS = {'data.sizes': ((64, 64),), 'data.lengths': (12,), 'student.steps': 2,
               'student.adapter.rank': 4, 'critic.adapter.rank': 4,
               'optim.student.warmup': 0, 'optim.critic.warmup': 0,
               'optim.student.lr': 3e-3, 'optim.critic.lr': 3e-3}
FP32 = {'teacher.dtype': 'float32', 'teacher.remat': 'none'}  # of a config, to compare numbers


def shrunk(config: Any) -> dict[str, Any]:
    """Fields of the tiny network; `config` is made to fit: the smallest batch, of small images."""
    known = {f.path for f in config_lib.fields_of(config)}
    fields = {k: x for k, x in TINY_FIELDS.items() if k in known}
    with config.unlocked():
        config.update_from_flattened_dict(fields)
        config.data.global_batch = config.student.steps * config.train.accumulate
    return TINY_NETWORKS[config.teacher.name]


# --- What is distilled ---


@dataclasses.dataclass(frozen=True)
class Subject:
    """A distillation that could begin: everything is on the devices but its state.

    Attributes:
      config: its config.
      teacher: with shapes for weights; `planned.frozen` has them.
      planned: recipe, layouts and programs; `planned.spec` creates the state.
      batch: random prompts, and real latents where a regulariser needs them.
      tokens: of a caption.
    """

    config: Any
    teacher: Teacher
    planned: Plan
    batch: Batch
    tokens: int

    @property
    def counts(self) -> dict[str, int]:
        """Programs of a step and how often each runs in it, in their order."""
        c = self.config.critic
        if c.get('order') == 'same_images':
            found = {'generator': 1, 'critic_on_images': 1, 'critic': c.updates - 1}
        else:
            found = {'rollout': int(c.get('order') == 'one_rollout'), 'critic': c.updates,
                     'generator': 1}
        return {kind: count for kind, count in found.items() if count}

    def lower(self, kind: str) -> Any:
        """The program of `counts`, traced for this state and batch."""
        p, shape = self.planned, self.batch.latents
        return getattr(p.program, kind.removesuffix('_on_images')).lower(
            p.frozen, p.spec.targets, self.batch_of(kind, shape, shape))

    def batch_of(self, kind: str, z: Any, x: Any) -> Batch:
        """The batch as that program takes it.

        `z` and `x` are what a rollout has made, or `x` the images of the generator: they are given
        to those that are after them in a step.
        """
        given = {'critic_on_images': {'x': x}}
        if 'rollout' in self.counts:
            given |= {'generator': {'z': z}, 'critic': {'x': x}}
        return dataclasses.replace(self.batch, **given.get(kind, {}))


def subject(config: Any, mesh: Mesh, network: Mapping[str, Any] | None = None,
            params: Any = None) -> Subject:
    """The distillation of a checked config.

    Args:
      config: of a distillation.
      mesh: where it runs.
      network: fields of the network's config that are not as published.
      params: the teacher's weights; None draws them by `config.seed`.

    Raises:
      ShardingError: mesh and batch, or a parameter, do not divide.
      AdapterError: adapters do not fit the network.
    """
    c, t = config, config.teacher
    sharding.check_batch(c.data.global_batch, mesh, distillation.parts_of_batch(c))
    size = max(c.data.get('sizes', ()), key=math.prod, default=None)
    options = LoadOptions(t.path, mesh, t.dtype, size, t.remat, t.attention, t.param_dtype)
    teacher = families.get(t.name).abstract(options, **(network or {}))
    # Nothing is decoded here, so that no decoder counts in the memory that is planned.
    teacher = dataclasses.replace(
        teacher, latents=dataclasses.replace(teacher.latents, decoder=None))
    tokens = max(c.data.get('lengths', ()), default=teacher.text.length)
    layout = sharding.shard_tree(teacher.params, teacher.rules, mesh)
    params = random_params(teacher.params, layout, c.seed) if params is None else jax.device_put(
        params, layout)
    null = random_cond(teacher, 1, tokens, c)
    planned = distillation.plan(c, dataclasses.replace(teacher, params=params), null, mesh)
    frozen = jax.device_put(planned.frozen, planned.frozen_shardings)
    del params  # `train.offload` frees the devices of them
    planned = dataclasses.replace(planned, frozen=frozen, spec=dataclasses.replace(
        planned.spec, source=(frozen.teacher,)))
    rows, real = c.data.global_batch, None
    if any(r.needs_real for r in planned.recipe.regularisers.values()):
        real = np.random.default_rng(c.seed).standard_normal(
            (rows, *teacher.latents.shape)).astype(np.float32)
    batch = Batch(random_cond(teacher, rows, tokens, c), real, teacher.latents.shape)
    return Subject(c, teacher, planned, sharding.put_batch(batch, mesh, rows), tokens)


def random_params(shapes: Any, layout: Any, seed: int) -> Any:
    """Weights about as large as trained ones, none of them zero: gates and the head are open.

    Kernels keep the variance of what they are given; norms' scales are about 1, all else about 0.
    """
    def one(path: Any, leaf: Any, where: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        mean, deviation = 0.0, 0.1
        if name.endswith('kernel'):
            deviation = 1 / math.sqrt(math.prod(leaf.shape[adapters.stacked(leaf):-1]))
        elif name.endswith(('weight', 'scale')):
            mean = 1.0
        return _draw(leaf.shape, leaf.dtype, where)(key, mean, deviation)

    return jax.tree_util.tree_map_with_path(one, shapes, layout)


@functools.cache  # leaves that are alike share a program
def _draw(shape: tuple[int, ...], dtype: Any, where: Any) -> Any:
    draw = lambda key, mean, deviation: (
        mean + deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jax.jit(draw, out_shardings=where)


def random_cond(teacher: Teacher, rows: int, tokens: int, config: Any) -> Cond:
    """Captions ``[rows, tokens]`` of different lengths, in the host's memory.

    Where text encoders pad and no token sees it, they have from an eighth of the tokens to all;
    a single row is the null prompt, one token long.
    """
    rng = np.random.default_rng((config.seed, rows))
    dtype = jnp.dtype(config.teacher.dtype)  # an encoder's on the mesh
    cond = teacher.cond.of_shape(rows, teacher.latents.shape)
    for name, like in teacher.cond.shapes(rows, tokens, dtype).items():
        if name == 'mask':
            lengths = np.linspace(max(1, tokens // 8), tokens, rows).round()
            lengths = np.ones(1) if rows == 1 else rng.permutation(lengths)
            cond[name] = np.arange(tokens)[None] < lengths[:, None]
            cond[name] |= not teacher.text.cuts
        elif name not in cond:
            cond[name] = rng.standard_normal(like.shape).astype(like.dtype)
    return cond
