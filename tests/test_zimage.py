"""Z-Image without PyTorch: fill and masks, layouts, variants that must agree, refusals.

`test_parity_zimage_network.py` holds the numbers against diffusers.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import published_text
import published_zimage as published
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec as P

from ddmd_jax import config as config_lib, families
from ddmd_jax.families.zimage import teacher as zimage
from ddmd_jax.models import attention, flops, layers, nextdit
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.zimage import ZImage, ZImageConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.planner import costs
from ddmd_jax.train import distillation
from ddmd_jax.weights.flat import WeightsError

CONFIG = {'_class_name': zimage.TRANSFORMER, **published.TRANSFORMER}
TINY = ZImageConfig(in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2,
                    cap_feat_dim=24, axes_dims=(8, 8, 8))
PARAMS = published_text.random_params(abstract_params(lambda: ZImage(TINY, nnx.Rngs(0))), 0)
CAPTIONS = [np.random.default_rng(n).standard_normal((n, 24)).astype(np.float32)
            for n in (5, 32, 40)]
T = jnp.asarray([0.2, 0.5, 0.9])


def noise(height=4, width=6, rows=3):
    return jax.random.normal(jax.random.key(1), (rows, height, width, 4))


@functools.cache
def network(method='__call__', **changes):
    return jax.jit(functional(
        lambda: ZImage(dataclasses.replace(TINY, **changes), nnx.Rngs(0)), method))


def run(params=PARAMS, x=None, cond=None, **changes):
    cond = cond or published.cond(CAPTIONS)
    with jax.default_matmul_precision('highest'):
        return np.asarray(network(**changes)(
            params, noise() if x is None else x, T, cond['embeds'], cond['mask']))


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol * np.sqrt(np.mean(np.square(want))))


# --- Fill ---


def test_a_longer_bucket_changes_nothing():
    """The batch's places are the compiler's affair: 40 tokens fill 64, and 96 are masked behind."""
    close(run(cond=published.cond(CAPTIONS, places=96)), run())


def test_padding_of_the_batch_is_not_looked_at():
    cond = published.cond(CAPTIONS)
    garbage = np.where(cond['mask'][..., None], cond['embeds'], -50.0)
    np.testing.assert_array_equal(run(cond=cond | {'embeds': garbage}), run())


@pytest.mark.parametrize('token, moved', [
    ('cap_pad_token', [True, False, True]),  # captions of 5, 32 and 40 tokens
    ('x_pad_token', [True, True, True])])  # 6 tokens of 32
def test_learnt_tokens_are_seen_where_they_fill(token, moved):
    changed = run(PARAMS | {token: PARAMS[token] + 1.0})
    assert [not np.array_equal(a, b) for a, b in zip(changed, run())] == moved


def test_an_image_that_fits_has_no_fill():
    x = noise(8, 16)  # 32 tokens
    changed = PARAMS | {'x_pad_token': PARAMS['x_pad_token'] + 1.0}
    np.testing.assert_array_equal(run(changed, x), run(PARAMS, x))


def test_features_are_the_images_tokens():
    cond = published.cond(CAPTIONS)
    assert network('features')(PARAMS, noise(), T, cond['embeds'], cond['mask']).shape == (3, 6, 48)


# --- Variants ---


def test_scanned_folded_and_rematerialised_networks_agree():
    cond = published.cond(CAPTIONS)

    def both(**changes):
        apply = functional(lambda: ZImage(dataclasses.replace(TINY, **changes), nnx.Rngs(0)))
        loss = lambda params: jnp.sum(jnp.square(
            apply(params, noise(), T, cond['embeds'], cond['mask'])))
        with jax.default_matmul_precision('highest'):
            return jax.jit(jax.value_and_grad(loss))(PARAMS)

    want, got = both(), both(remat='full', unroll=True, fold_tokens=True)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want[1]))  # everything learns


def test_bf16_is_near_and_comes_out_in_fp32():
    got = run(dtype='bfloat16')
    assert got.dtype == np.float32
    close(got, run(), 0.2)


@pytest.mark.parametrize('kind, atol', [
    pytest.param('splash', 1e-3, marks=pytest.mark.slow), ('cudnn', 1e-5)])
def test_it_does_not_notice_which_attention_it_has(kind, atol, monkeypatch):
    monkeypatch.setattr(nextdit, 'attend', functools.partial(attention.attend, interpret=True))
    close(run(attention=kind), run(), atol)


# --- Layout, cost, refusals ---


def test_matrices_are_split_and_the_rest_is_whole():
    mesh = AbstractMesh((1, 4, 2), sharding.AXES)
    spec = lambda path, shape: sharding.spec_for(path, shape, zimage.RULES, mesh)
    assert spec('layers/attn/to_q/kernel', (30, 3840, 3840)) == P(None, 'fsdp', 'tensor')
    assert spec('layers/feed_forward/linear_2/kernel', (30, 10240, 3840)) == P(
        None, 'tensor', 'fsdp')
    for token in ('x_pad_token', 'cap_pad_token'):
        assert spec(token, (1, 3840)) in (P(), P(None, None))
    shapes = abstract_params(lambda: ZImage(ZImageConfig(), nnx.Rngs(0)))
    sharding.shard_tree(shapes, zimage.RULES, sharding.make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize('size, tokens', [((4, 6), 5), ((8, 16), 64)])
def test_flops_are_those_of_the_program(size, tokens):
    cfg = dataclasses.replace(TINY, n_layers=3, n_refiner_layers=2)
    make = lambda: ZImage(cfg, nnx.Rngs(0))
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    for method, count in (('__call__', flops.zimage_forward), ('features', flops.zimage_features)):
        text = jax.jit(layers.functional(make, method)).lower(
            layers.abstract_params(make), shape(2, *size, 4), shape(2), shape(2, tokens, 24),
            shape(2, tokens, dtype=bool)).compile().as_text()
        assert costs.summary(text).flops == 2 * count(cfg, size, tokens)


def test_the_published_network_by_hand():
    """At 1024 pixels: twice parameters times tokens, and attention; a refiner has fewer tokens."""
    layer = 2 * 4608 * (4 * 3840**2 + 3 * 3840 * 10240) + 4 * 4608**2 * 3840
    assert flops.zimage_forward(ZImageConfig(), (128, 128), 512) == pytest.approx(
        32 * layer, rel=0.01)


@pytest.mark.parametrize('field, value, words', [
    ('all_patch_size', [2, 4], r'all_patch_size is \[2, 4\], supported is \[2\]'),
    ('qk_norm', False, 'qk_norm is False'), ('siglip_feat_dim', 1152, 'siglip_feat_dim is 1152'),
    ('axes_dims', [8, 8, 6], 'axes_dims'), ('n_heads', 5, 'multiple of n_heads'),
    ('dim', None, 'dim is None, not a whole number from 1')])
def test_configs_of_other_networks_are_one_line(tmp_path, field, value, words):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG | {field: value}))
    with pytest.raises(WeightsError, match=words) as e:
        families.get('zimage').export.open_source(str(tmp_path))
    assert len(str(e.value).splitlines()) == 1


CARDS = {  # what each model's own card says
    'base': '# Z-Image\nSee also Z-Image-Turbo.\npipe = ZImagePipeline.from_pretrained(\n'
            '    "Tongyi-MAI/Z-Image", torch_dtype=torch.bfloat16)',
    'turbo': '# Z-Image\npipe = ZImagePipeline.from_pretrained(\n    "Tongyi-MAI/Z-Image-Turbo")',
    'ours': '---\ntags: [text-to-image, distillation, few-step, decoupled-dmd]\n---\n'}


@pytest.mark.parametrize('file, content, words', [
    ('scheduler/scheduler_config.json', {'shift': 6.0}, ''),
    ('scheduler/scheduler_config.json', {'shift': 3.0}, "shift is Z-Image-Turbo's 3, the base has"),
    ('model_index.json', {'_name_or_path': 'Tongyi-MAI/Z-Image-Turbo'}, 'index.json calls it'),
    ('transformer/config.json', {'_name_or_path': '/a/z-image-turbo/transformer'}, 'it /a/z-image'),
    ('config.json', {'_name_or_path': 'Tongyi-MAI/Z-Image'}, ''),
    ('README.md', CARDS['base'], ''),
    ('README.md', CARDS['turbo'], 'its card loads Tongyi-MAI/Z-Image-Turbo'),
    ('README.md', CARDS['ours'], "few-step student's")])
def test_what_says_that_a_teacher_is_distilled(tmp_path, file, content, words):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    found = families.get('zimage').distilled(str(tmp_path))
    assert words in found and bool(words) == bool(found)


def test_luminas_own_students_are_no_teachers(tmp_path):
    distilled = families.get('lumina').distilled
    (tmp_path / 'config.json').write_text('{}')
    assert distilled(str(tmp_path)) == ''
    (tmp_path / 'README.md').write_text(CARDS['ours'])
    assert "few-step student's" in distilled(str(tmp_path))


@pytest.mark.parametrize('name, words', [
    ('stabilityai/sdxl-turbo', 'its card loads stabilityai/sdxl-turbo'),
    ('ByteDance/SDXL-Lightning', 'its card loads'),
    ('latent-consistency/lcm-sdxl', 'its card loads'),
    ('stabilityai/stable-diffusion-xl-base-1.0', '')])
def test_sdxls_students_are_no_teachers(tmp_path, name, words):
    (tmp_path / 'README.md').write_text(
        f'# SDXL\nFaster: SDXL-Turbo.\npipe = AutoPipelineForText2Image.from_pretrained("{name}")')
    found = families.get('sdxl').distilled(str(tmp_path))
    assert words in found and bool(words) == bool(found)


def test_its_lora_config_trains_adapters_alone():
    whole, low = (config_lib.load(name) for name in ('zimage', 'zimage:lora'))
    for whose in ('student', 'critic'):
        assert whole[whose].adapter.kind == 'full' and low[whose].adapter.kind == 'lora'
    assert low.method.schedule == whole.method.schedule == 'decoupled_hybrid'
    assert low.student.steps == 8


def test_a_pipelines_transformer_is_told_by_the_pipeline(tmp_path):
    (tmp_path / 'transformer').mkdir()
    (tmp_path / 'README.md').write_text(CARDS['turbo'])
    distilled = lambda: families.get('zimage').distilled(str(tmp_path / 'transformer'))
    assert not distilled()
    (tmp_path / 'model_index.json').write_text('{}')
    assert 'its card loads Tongyi-MAI/Z-Image-Turbo' in distilled()


def test_a_distilled_teacher_is_refused_unless_forced(tmp_path):
    """Before its weights are read: there are none here."""
    config = config_lib.load('zimage')
    config.teacher.path, config.mesh.fsdp = str(tmp_path), 1
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    (tmp_path / 'README.md').write_text(CARDS['turbo'])
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with pytest.raises(WeightsError, match='no guidance signal left for CA.*Z-Image-Turbo') as e:
        distillation.load_teacher(config, mesh)
    assert len(str(e.value).splitlines()) == 1
    for path, value in (('teacher', {'allow_distilled': True}), ('method', {'weight_ca': 0.0})):
        forced = config_lib.load('zimage')
        forced.teacher.path = str(tmp_path)
        forced[path].update(value)
        with pytest.raises(WeightsError, match='has no diffusion_pytorch_model.safetensors'):
            distillation.load_teacher(forced, mesh)
