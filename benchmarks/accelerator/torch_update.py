"""An update of Lumina's student and critic in plain PyTorch, with diffusers' own network.

Backward simulation, CA and DM, clipping, AdamW and EMA of a generator's update, denoising loss of
a critic's: by the paper's formulas, on the weights, prompts, noises and levels of ours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.accelerator import synthetic

# --- What ours are, by the published names and layouts ---


def published(tree: Any) -> dict[str, np.ndarray]:
    """Weights of ours by the published names, fp32 in the host's memory."""
    import jax

    from ddmd_jax.families.lumina import names
    from ddmd_jax.weights import flat

    found = {}
    for path, leaf in flat.flatten(tree).items():
        entry, whole = names.transformer(path), np.asarray(jax.device_get(leaf), np.float32)
        for layer, name in enumerate(entry.names(leaf.shape)):
            found[name] = np.ascontiguousarray(
                entry.to_theirs(whole[layer] if entry.stacked else whole))
    return found


def draws(subject: synthetic.Subject, kind: str, count: int) -> dict[str, Any]:
    """Noises ``[B, C, H, W]`` and levels ``[B]`` that the update number `count` of ours draws."""
    import jax
    import jax.numpy as jnp

    from ddmd_jax.method.inputs import CriticKeys, GeneratorKeys
    from ddmd_jax.method.schedules import draw_between

    c, recipe, rows = subject.config, subject.planned.recipe.at(count), subject.batch.rows
    few, shape = recipe.steps, (rows, *subject.batch.shape)
    root = jax.random.fold_in(jax.random.key(c.seed), int(kind == 'critic'))
    key = jax.random.fold_in(root, count)
    normal = lambda key: np.asarray(
        jax.random.normal(key, shape, jnp.float32)).transpose(0, 3, 1, 2)
    if kind == 'critic':
        keys = CriticKeys.of(key)
        found = {'noise': normal(keys.noise), 'tau': np.asarray(
            few.time(draw_between(keys.level, *recipe.critic_range, (rows,))))}
    else:
        keys = GeneratorKeys.of(key)
        step = jnp.arange(rows) % few.n
        tau = recipe.schedule.levels(keys.levels, few.uniform[step], recipe.ranges, few.time)
        found = {'noise_ca': normal(keys.noise_ca), 'noise_dm': normal(keys.noise_dm),
                 'tau_ca': np.asarray(tau.ca), 'tau_dm': np.asarray(tau.dm)}
    noises = [normal(one) for one in jax.random.split(keys.simulation, few.n)]
    return found | {f'noise_{j}': x for j, x in enumerate(noises)}


# --- The update ---


class Torch:
    """The same in PyTorch, by the formulas of the paper and diffusers' network."""

    resident = 0
    attention: list[str] | None = None  # kernels of `scaled_dot_product_attention`, once seen

    def __init__(self, subject: synthetic.Subject, network: dict[str, Any],
                 weights: dict[str, np.ndarray], compiled: bool):
        import diffusers
        import jax
        import torch

        from ddmd_jax.models.nextdit import NextDiTConfig

        c, few = subject.config, subject.planned.recipe.steps
        self.torch, self.subject, self.weights = torch, subject, weights
        self.compiled = compiled
        self.device = torch.device('cuda' if jax.devices()[0].platform == 'gpu' else 'cpu')
        self.half = c.teacher.dtype == 'bfloat16'
        known = {name: x for name, x in dataclasses.asdict(NextDiTConfig(**network)).items()
                 if name not in ('dtype', 'remat', 'attention', 'fold_tokens', 'unroll')}
        self.nets, self.calls = {}, {}
        for name in ('teacher', 'student', 'critic'):
            with torch.device('meta'):
                net = diffusers.Lumina2Transformer2DModel(**known)
            # Its tables are no buffers, and would stay on that device.
            net.rope_embedder = type(net.rope_embedder)(
                10000, net.config.axes_dim_rope, net.config.axes_lens, net.config.patch_size)
            net.requires_grad_(name != 'teacher').eval()
            if c.teacher.remat != 'none' and name != 'teacher':
                net.enable_gradient_checkpointing()
            self.nets[name] = net
            self.calls[name] = torch.compile(net) if compiled else net
        if compiled:
            # Three networks share code, with and without gradients and for several numbers of rows;
            # beyond eight of such, the rest would run eagerly and nobody would be told.
            torch._dynamo.config.recompile_limit = 64
        self.times = torch.tensor(np.asarray(few.times))
        cond = lambda tree: {k: torch.tensor(np.asarray(x, np.float32 if k == 'embeds' else bool))
                             for k, x in jax.device_get(tree).items()}
        self.cond, self.null = cond(subject.batch.cond), cond(subject.planned.frozen.null)

    # The formulas.

    def predict(self, name: str, x: Any, t: Any, cond: dict[str, Any]) -> Any:
        """x_hat: the published network's output is the velocity ``x - noise``, its time t."""
        torch = self.torch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            v = self.calls[name](x, t, cond['embeds'], cond['mask'], return_dict=False)[0]
        return x + (1 - at(t)) * v.float()

    def student_inputs(self, d: dict[str, Any]) -> tuple[Any, Any]:
        """(z, its time): row b is at step b mod N, reached by the student's own earlier steps."""
        n, z = len(self.times), d['noise_0']
        k = self.torch.arange(len(z), device=self.device) % n
        for j in range(n - 1):
            rows = (k > j).nonzero()[:, 0]
            t = self.times[j].expand(len(rows))
            x_hat = self.predict('student', z[rows], t, {
                name: x[rows] for name, x in self.cond.items()})
            z = z.index_copy(0, rows, noised(x_hat, self.times[j + 1].expand(len(rows)),
                                             d[f'noise_{j + 1}'][rows]))
        return z, self.times[k]

    def generator(self, d: dict[str, Any], count: int) -> dict[str, Any]:
        torch, recipe = self.torch, self.subject.planned.recipe
        with torch.no_grad():
            z, t = self.student_inputs(d)
        x_hat = self.predict('student', z, t, self.cond)
        with torch.no_grad():
            x = x_hat.detach()
            x_ca, x_dm = (noised(x, d[f'tau_{w}'], d[f'noise_{w}']) for w in ('ca', 'dm'))
            null = {name: x.expand_as(self.cond[name]) for name, x in self.null.items()}
            three = {name: torch.cat([c, null[name], c]) for name, c in self.cond.items()}
            ca_cond, ca_null, dm_cond = self.predict(
                'teacher', torch.cat([x_ca, x_ca, x_dm]),
                torch.cat([d['tau_ca'], d['tau_ca'], d['tau_dm']]), three).chunk(3)
            fake = self.predict('critic', x_dm, d['tau_dm'], self.cond)
            size = lambda gap: gap.abs().mean((1, 2, 3), keepdim=True).clamp(
                min=recipe.normaliser.floor)
            ca = (recipe.alpha.scale - 1) * (ca_cond - ca_null) / size(x - ca_cond)
            dm = (dm_cond - fake) / size(x - dm_cond)
            target = x + recipe.weight_ca * ca + recipe.weight_dm * dm
        loss = 0.5 * torch.nn.functional.mse_loss(x_hat, target)
        norm = self.step('student', loss, count)
        student = self.subject.config.student
        decay = min(student.ema, (1 + count) / (10 + count)) if student.ema_ramp else student.ema
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.nets['student'].parameters()],
                             1 - decay)
        return {'loss': loss.item(), 'grad_norm': norm.item()}

    def critic(self, d: dict[str, Any], count: int) -> dict[str, Any]:
        torch = self.torch
        with torch.no_grad():
            x = self.predict('student', *self.student_inputs(d), self.cond)
        x_hat = self.predict('critic', noised(x, d['tau'], d['noise']), d['tau'], self.cond)
        loss = ((x_hat - x) / at((1 - d['tau']).clamp(min=0.02))).square().mean()
        norm = self.step('critic', loss, count)
        return {'fake_loss': loss.item(), 'critic_grad_norm': norm.item()}

    def step(self, name: str, loss: Any, count: int) -> Any:
        """Gradient, clipping and AdamW; the norm before clipping."""
        from ddmd_jax.train import optim

        cfg, optimiser = self.subject.config.optim[name], self.optimisers[name]
        loss.backward()
        norm = self.torch.nn.utils.clip_grad_norm_(self.nets[name].parameters(), cfg.clip)
        rate = float(optim.learning_rate(cfg, self.subject.config.train.steps)(count))
        for group in optimiser.param_groups:
            group['lr'] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return norm

    # A turn.

    def load(self) -> None:
        """Everything comes to the device, as it is at step 0."""
        torch, c = self.torch, self.subject.config
        stored = getattr(torch, c.teacher.param_dtype)
        for name, net in self.nets.items():
            state = {k: torch.tensor(x, device=self.device) for k, x in self.weights.items()}
            if name == 'teacher':
                state = {k: x.to(stored) if x.ndim > 1 else x for k, x in state.items()}
            net.load_state_dict(state, assign=True)
        self.ema = [p.detach().clone() for p in self.nets['student'].parameters()]
        self.optimisers = {}
        for name in ('student', 'critic'):
            cfg, params = c.optim[name], list(self.nets[name].parameters())
            groups = [{'params': [p for p in params if p.ndim > 1],
                       'weight_decay': cfg.weight_decay},
                      {'params': [p for p in params if p.ndim < 2], 'weight_decay': 0.0}]
            self.optimisers[name] = torch.optim.AdamW(
                groups, lr=cfg.lr, betas=(cfg.b1, cfg.b2), eps=cfg.eps, fused=True)
        move = lambda tree: {k: x.to(self.device) for k, x in tree.items()}
        self.cond, self.null = move(self.cond), move(self.null)
        self.times = self.times.to(self.device)

    def looked_at(self, update: Callable[..., Any], given: dict[str, Any],
                  count: int) -> dict[str, Any]:
        """The update, and `attention` by PyTorch's profiler: kernels differ by mask and dtype."""
        profiler = self.torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as seen:
            metrics = update(given, count)
        self.attention = sorted({event.key for event in seen.key_averages()
                                 if event.key.startswith('aten::_scaled_dot_product')})
        return metrics

    def dynamo(self) -> dict[str, Any]:
        """What torch.compile counts of graphs and of breaks between them; {} where it is not."""
        if not self.compiled:
            return {}
        return {name: dict(counts) for name, counts in self.torch._dynamo.utils.counters.items()
                if name in ('stats', 'graph_break', 'recompiles')}

    def free(self) -> None:
        """Nothing but the networks' shapes is left."""
        for net in self.nets.values():
            net.to('meta')
        del self.ema, self.optimisers
        if self.device.type == 'cuda':
            self.torch.cuda.empty_cache()

    def turn(self, updates: int) -> tuple[list[dict[str, Any]], Callable[[str], Any]]:
        self.load()
        lines = []
        for count in range(updates):
            for kind in self.subject.counts:
                given = {name: self.torch.tensor(x, device=self.device)
                         for name, x in draws(self.subject, kind, count).items()}
                begun = time.monotonic()
                update = getattr(self, kind)
                look = self.attention is None
                metrics = self.looked_at(update, given, count) if look else update(given, count)
                if self.device.type == 'cuda':
                    self.torch.cuda.synchronize()
                lines.append({'program': kind, 'seconds': time.monotonic() - begun,
                              'metrics': metrics})

        def weights(name: str) -> dict[str, np.ndarray]:
            names = [k for k, _ in self.nets['student'].named_parameters()]
            found = self.ema if name == 'ema' else self.nets[name].parameters()
            return {k: x.detach().cpu().numpy() for k, x in zip(names, found)}

        return lines, weights


def at(t: Any) -> Any:
    """Times ``[B]`` as they stand against ``[B, C, H, W]``."""
    return t[:, None, None, None]


def noised(x: Any, t: Any, noise: Any) -> Any:
    """``t x + (1 - t) noise``."""
    return at(t) * x + (1 - at(t)) * noise
