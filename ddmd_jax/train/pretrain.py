"""The task `pretrain`: trains a family's own teacher and text encoder by flow matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jax.sharding import Mesh

from ddmd_jax import families
from ddmd_jax.data import loader
from ddmd_jax.data.order import Order
from ddmd_jax.diffusion import process
from ddmd_jax.families.pretraining import Pretraining
from ddmd_jax.parallel import sharding
from ddmd_jax.train import optim, train, update
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Startup
from ddmd_jax.train.state import StateSpec, TrainState, fresh
from ddmd_jax.train.train import NOTHING_ELSE, Options
from ddmd_jax.train.watch.logs import RunLog
from ddmd_jax.util.places import Place

Array = jax.Array


def pretrain(config: Any, workdir: Place, options: Options = NOTHING_ELSE) -> None:
    """Trains to the end and writes the EMA weights as ``workdir/teacher.safetensors``.

    Raises:
      see `train.fit`.
    """
    train.fit_and_write(prepare(config), config, workdir / 'teacher.safetensors', options)


def prepare(config: Any) -> Pretrain:
    """Everything that `train.fit` needs."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.global_batch, mesh)
    return Pretrain(config, families.get(config.teacher.name).pretraining(config), mesh)


class Pretrain:
    """A teacher's training as a `train.Task`; student and EMA hold denoiser and text encoder."""

    name = 'pretrain'

    def __init__(self, config: Any, own: Pretraining, mesh: Mesh):
        self.config, self.own, self.startup = config, own, Startup()
        self.identities = {'teacher_identity': 'none', 'data_identity': own.identity}
        self.order = Order(own.rows, config.data.global_batch, config.seed)
        tx = optim.make_optimizer(config.optim.student, config.train.steps)
        self.spec = StateSpec(lambda: fresh(own.init(jax.random.key(config.seed)), tx),
                              own.rules, mesh)
        self._update = update.plain(self.loss, config)

    def feed(self, skip: frozenset[int]) -> Feed:
        mesh, rows = self.spec.mesh, self.config.data.global_batch
        read = loader.batches(self.order, lambda planned: self.own.lookup(planned.rows),
                              sharding.rows_here(mesh, rows))
        return Feed(read, lambda batch: sharding.put_batch(batch, mesh, rows), skip)

    def step(self, state: TrainState, next_batch: Callable[[], Any],
             fresh: bool) -> tuple[TrainState, dict[str, Any]]:
        return self._update(state, next_batch(), self.config.train.steps)

    def loss(self, params: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        """Flow matching: mean squared velocity error, a scalar; some captions are dropped."""
        m, x = self.config.method, batch['image'].astype(jnp.float32)
        k_time, k_noise, k_drop = jax.random.split(key, 3)
        t = draw_times(k_time, x.shape[0], m.time_mean, m.time_std)
        noise = jax.random.normal(k_noise, x.shape, jnp.float32)
        drop = jax.random.uniform(k_drop, (x.shape[0], 1), jnp.float32) < m.dropout
        x_t = process.renoise(x, t, noise)
        cond = self.own.condition(params, batch, drop)
        x_hat = self.own.predict_clean(params, x_t, t, cond)
        error = process.to_velocity(x_t, x_hat, t) - process.velocity(x, noise)
        return jnp.mean(jnp.square(error)), {}

    def measure(self, state: TrainState, history: list[dict[str, Any]],
                values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        return values, f'loss {values["loss"]:.4f} grad {values["grad_norm"]:.2f}'

    def show(self, state: TrainState, step: int, log: RunLog) -> None:
        log.image(step, 'samples/real_teacher', self.own.show(state.ema))

    def write(self, file: Place, params: Any, step: int) -> dict[str, Any]:
        self.own.save(file, params, step)
        return {}

    def read_weights(self, path: str) -> Any:
        return self.own.read(path)


def draw_times(key: Array, batch: int, mean: float, std: float) -> Array:
    """Stratified logit-normal times ``[batch]``: one from each of `batch` equal slices."""
    u = (jnp.arange(batch) + jax.random.uniform(key, (batch,), jnp.float32)) / batch
    u = jnp.clip(u, 1e-4, 1 - 1e-4)
    return jax.nn.sigmoid(mean + std * norm.ppf(u)).astype(jnp.float32)
