"""SDXL without PyTorch: what a folder is, the network in the one convention, over a mesh."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import published_sdxl
import published_text
import pytest
import tiny
from flax import nnx
from saved import save

from ddmd_jax import families
from ddmd_jax.diffusion.time import FewSteps, StepTable
from ddmd_jax.export import models
from ddmd_jax.families import LoadOptions, published_vae
from ddmd_jax.families.sdxl import names, teacher as sdxl
from ddmd_jax.models import discriminator
from ddmd_jax.models.layers import abstract_params
from ddmd_jax.models.unet import UNet, UNetConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.weights import flat
from ddmd_jax.weights.flat import WeightsError

PUBLISHED = {'_class_name': sdxl.UNET, 'in_channels': 4, 'out_channels': 4, 'norm_eps': 1e-5,
             **published_sdxl.UNET}
BASE = {'_class_name': 'StableDiffusionXLPipeline'}
SMALL = UNetConfig(
    down_block_types=('CrossAttnDownBlock2D',), up_block_types=('CrossAttnUpBlock2D',),
    block_out_channels=(8,), layers_per_block=1, transformer_layers_per_block=(1,),
    attention_head_dim=(2,), cross_attention_dim=6, addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 + 24, norm_num_groups=2)


def written(folder, unet, index=BASE, **more):
    """A pipeline's folder, or with `index` None a bare UNet's, of configs alone."""
    parts = {'unet' if index else '.': {'config.json': PUBLISHED | unet}, **more}
    for name, files in parts.items():
        (folder / name).mkdir(exist_ok=True)
        for file, content in files.items():
            (folder / name / file).write_text(json.dumps(content))
    if index:
        (folder / 'model_index.json').write_text(json.dumps(index))
    return folder


# --- Folders ---

SD15 = {'addition_embed_type': None, 'cross_attention_dim': 768}
REFINER = {'cross_attention_dim': 1280, 'addition_time_embed_dim': 256,
           'projection_class_embeddings_input_dim': 2560}


@pytest.mark.parametrize('unet, index, words', [
    (SD15, BASE, 'is the UNet of Stable Diffusion 1 or 2 .texts 768 wide'),
    (SD15, None, 'is the UNet of Stable Diffusion 1 or 2 .texts 768 wide'),
    (SD15, {'_class_name': 'StableDiffusionPipeline'},
     'is Stable Diffusion 1 or 2 .a StableDiffusionPipeline., not StableDiffusionXLPipeline'),
    ({}, {'_class_name': 'FluxPipeline'}, 'is a FluxPipeline, not StableDiffusionXLPipeline'),
    (REFINER, None, "is the UNet of SDXL's refiner"),
    ({}, {'_class_name': 'StableDiffusionXLImg2ImgPipeline', 'requires_aesthetics_score': True},
     "is the UNet of SDXL's refiner"),
    ({'in_channels': 9}, BASE, 'is an inpainting UNet .9 channels'),
    ({'in_channels': 9}, None, 'is an inpainting UNet .9 channels'),
    ({'in_channels': 8}, BASE, 'takes 8 channels and gives 4'),
    ({'_class_name': 'UNet2DModel'}, BASE, 'is UNet2DModel, not UNet2DConditionModel')])
def test_another_models_folder_says_what_it_is(tmp_path, unet, index, words):
    folder = written(tmp_path, unet, index)
    with pytest.raises(WeightsError, match=words) as e:
        sdxl.open_folder(folder)
    assert len(str(e.value).splitlines()) == 1 and 'give a folder of SDXL-base' in str(e.value)


def test_a_refiner_is_known_by_its_pooled_text(tmp_path):
    """Of any width: five numbers stand beside it instead of six."""
    sizes = {'projection_class_embeddings_input_dim': 20 + 5 * 8}
    folder = written(tmp_path, sizes, text_encoder_2={'config.json': {'projection_dim': 20}})
    with pytest.raises(WeightsError, match='refiner'):
        sdxl.open_folder(folder)


@pytest.mark.parametrize('fields, words', [
    ({'time_cond_proj_dim': 256}, 'time_cond_proj_dim is 256, supported is None'),
    ({'transformer_layers_per_block': [[1, 2], 3]}, 'supported are whole numbers'),
    ({'attention_head_dim': [5]}, 'differ in length'),
    ({'down_block_types': ['DownBlock2D', 'AttnDownBlock2D']}, 'blocks of type AttnDownBlock2D'),
    ({'projection_class_embeddings_input_dim': 48}, 'leaves no room for pooled text'),
    ({'norm_num_groups': None}, 'is not one of')])
def test_a_unet_of_another_shape_is_one_line(fields, words):
    with pytest.raises(WeightsError, match=words) as e:
        sdxl.model_config(PUBLISHED | fields)
    assert len(str(e.value).splitlines()) == 1


def test_one_number_stands_for_every_level():
    of = lambda **fields: sdxl.model_config(PUBLISHED | fields)
    assert of(transformer_layers_per_block=2).transformer_layers_per_block == (2, 2)
    assert of(attention_head_dim=4).attention_head_dim == (4, 4)
    assert of(num_attention_heads=(1, 2)).attention_head_dim == (1, 2)


@pytest.mark.parametrize('fields, words', [
    ({'prediction_type': 'v_prediction'}, 'prediction_type is v_prediction, supported is epsilon'),
    ({'rescale_betas_zero_snr': True}, 'rescale_betas_zero_snr is True'),
    ({'trained_betas': [0.1] * 50}, 'trained_betas is'),
    ({'beta_schedule': 'squaredcos_cap_v2'}, 'no table of steps that is known'),
    ({'beta_end': None}, 'no table of steps that is known')])
def test_another_process_is_one_line(tmp_path, fields, words):
    scheduler = {'scheduler_config.json': published_sdxl.SCHEDULER | fields}
    folder = written(tmp_path, {}, scheduler=scheduler)
    with pytest.raises(WeightsError, match=words) as e:
        sdxl.open_folder(folder)
    assert len(str(e.value).splitlines()) == 1


def test_the_table_is_the_schedulers(tmp_path):
    assert sdxl.open_folder(written(tmp_path, {})).time == StepTable()
    own = published_sdxl.SCHEDULER | {'beta_end': 0.02, 'num_train_timesteps': 500,
                                      'timestep_spacing': 'trailing', 'steps_offset': 0}
    folder = written(tmp_path, {}, scheduler={'scheduler_config.json': own})
    assert sdxl.open_folder(folder).time == StepTable(
        0.00085, 0.02, count=500, first=499, spacing='trailing', offset=0)
    bare = {k: x for k, x in published_sdxl.SCHEDULER.items() if k != 'steps_offset'}
    folder = written(tmp_path, {}, scheduler={'scheduler_config.json': bare})
    assert sdxl.open_folder(folder).time == StepTable(offset=0)  # diffusers' own default


def test_a_run_that_starts_at_another_step_is_drawn_from_there(tmp_path):
    """As DMD2's single step: what `sample` and `evaluate` draw by is what was trained."""
    manifest = {'task': 'distill', 'teacher.name': 'sdxl', 'student.steps': 1}
    for name, fields, step in (('one', {'student.first_step': 399}, 399), ('own', {}, 999)):
        run = save(tmp_path / name, manifest | fields, {'w': np.zeros(2, 'f')})
        model = models.find_model(run, 'anywhere', None)
        few = FewSteps(model.time(sdxl.TABLE), model.steps)
        np.testing.assert_array_equal(sdxl.TABLE.step_of(few.times), [step])


def test_the_published_codecs_config_is_older_than_its_fields():
    """Those that it lacks are diffusers' defaults, and not those of another family's codec."""
    published = {  # vae/config.json of stabilityai/stable-diffusion-xl-base-1.0, what is read of it
        'block_out_channels': [128, 256, 512, 512], 'force_upcast': True, 'in_channels': 3,
        'latent_channels': 4, 'layers_per_block': 2, 'norm_num_groups': 32, 'out_channels': 3,
        'sample_size': 1024, 'scaling_factor': 0.13025}
    assert published_vae.vae_config(published, 'float32') == sdxl.CODEC


def test_fields_that_diffusers_has_defaults_for_may_be_absent():
    left = {k: x for k, x in PUBLISHED.items() if k not in sdxl.OPTIONAL}
    assert sdxl.model_config(left | {'norm_num_groups': 4}).layers_per_block == 2
    with pytest.raises(WeightsError, match='cross_attention_dim'):
        sdxl.model_config({k: x for k, x in PUBLISHED.items() if k != 'cross_attention_dim'})


def test_names_are_of_parameters():
    assert names.unet('up_blocks/0/upsamplers/0/conv/kernel').layout == 'conv'
    entry = names.unet('mid_block/attentions/0/transformer_blocks/ff/proj/bias')
    assert entry.name == 'mid_block.attentions.0.transformer_blocks.{}.ff.net.0.proj.bias'
    assert names.unet('down_blocks/0/resnets/1/norm2/scale').name.endswith('norm2.weight')


def test_the_planner_has_shapes_of_everything():
    """What is compiled for: text to conditioning, sizes with it, and the counts as published."""
    found = families.get('sdxl').abstract(LoadOptions(dtype='bfloat16'))
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    assert count(found.params) == 2_567_463_684
    assert count(found.latents.decoder.params) == 83_653_863
    assert found.latents.shape == (128, 128, 4)
    assert found.latents.shape_of((832, 1216)) == (104, 152, 4)
    tokens = {name: jax.ShapeDtypeStruct((2, 77), jnp.int32) for name in found.text.ids}
    tokens |= {'mask': jax.ShapeDtypeStruct((2, 77), bool)}
    tokens |= found.cond.of_shape(2, (104, 152, 4))
    assert tokens['time_ids'].tolist() == [[832, 1216, 0, 0, 832, 1216]] * 2
    cond = jax.eval_shape(found.text.apply, found.text.params, tokens)
    assert cond == found.cond.shapes(2, 77, jnp.bfloat16)
    # DMD2's head, at the size that its paper and its code are for.
    maps = discriminator.feature_shape(found)
    assert maps == (32, 32, 1280)
    head = discriminator.make_head('convolutions', maps)
    assert count(jax.eval_shape(
        lambda: discriminator.init(head, jax.random.key(0)))) == 104_874_241
    # The meshes that it may be split over: a kernel that does not divide is an error.
    for fsdp, tensor in ((16, 1), (64, 1), (16, 4)):
        mesh = jax.sharding.AbstractMesh((1, fsdp, tensor), sharding.AXES)
        for path, leaf in flat.flatten(found.params).items():
            assert path.endswith('kernel') == bool(
                any(sharding.spec_for(path, leaf.shape, found.rules, mesh))), path


# --- The network ---


@functools.cache
def small_params(seed=0):
    return published_text.random_params(
        abstract_params(lambda: UNet(SMALL, nnx.Rngs(0))), seed)


def small_cond(rows):
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.standard_normal((rows, *shape)).astype(np.float32)
    return {'embeds': draw(3, 6), 'mask': np.ones((rows, 3), bool), 'pooled': draw(6)}


def test_what_is_not_said_is_that_latents_are_the_whole_image():
    """And a noisier level than the table's is its end, not a division by zero."""
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 4)).astype('f')
    t = jnp.asarray([0.5, 0.0])
    predict, cond = jax.jit(sdxl.make_denoiser(SMALL)), small_cond(2)
    got = predict(small_params(), x, t, cond)
    ids = np.tile([32, 48, 0, 0, 32, 48], (2, 1))
    np.testing.assert_array_equal(got, predict(small_params(), x, t, cond | {'time_ids': ids}))
    other = predict(small_params(), x, t, cond | {'time_ids': ids + 8})
    assert got.dtype == jnp.float32 and np.isfinite(got).all() and np.abs(got - other).max() > 1e-4
    end = predict(small_params(), x, jnp.asarray([0.5, StepTable().times[-1]]), cond)
    np.testing.assert_array_equal(got, end)
    maps = jax.eval_shape(sdxl.make_features(SMALL), small_params(), x, t, cond)
    assert maps.shape == (2, 4, 6, 8)
    assert sdxl.cond_spec(SMALL).shapes(2, 3)['time_ids'].shape == (2, 6)


@pytest.mark.slow
def test_recomputing_changes_nothing():
    x, cond = np.random.default_rng(1).standard_normal((1, 4, 4, 4)).astype('f'), small_cond(1)

    def gradient(remat):
        predict = sdxl.make_denoiser(dataclasses.replace(SMALL, remat=remat))
        return jax.grad(lambda params: jnp.mean(jnp.square(predict(params, x, 0.5, cond))))

    traced = {remat: str(jax.make_jaxpr(gradient(remat))(small_params()))
              for remat in ('none', 'full', 'dots')}
    # Every residual block and every stack of transformer blocks, and what changes the size.
    assert [text.count('remat') > 6 for text in traced.values()] == [False, True, True]
    plain, again = (jax.jit(gradient(remat))(small_params()) for remat in ('none', 'full'))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, again, plain)


def test_bf16_is_a_rounding():
    """Products in bf16, x_hat in fp32 whatever the type of the products."""
    x = np.random.default_rng(2).standard_normal((2, 4, 4, 4)).astype('f')
    run = lambda dtype: np.asarray(jax.jit(sdxl.make_denoiser(
        dataclasses.replace(SMALL, dtype=dtype)))(small_params(), x, 0.5, small_cond(2)))
    exact, half = run('float32'), run('bfloat16')
    assert half.dtype == np.float32
    assert 1e-5 < np.abs(half - exact).max() < 0.1 * np.sqrt(np.mean(exact**2))


def test_eight_devices_are_one():
    """Rows over data and fsdp, kernels over fsdp and tensor: the same gradients."""
    tiny.run_on_devices(__file__)


def compare_meshes():
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    layout = sharding.shard_tree(small_params(), sdxl.RULES, mesh)
    split = {str(s.spec) for s in jax.tree.leaves(layout) if s.spec}
    assert len(split) >= 4, split
    x = np.random.default_rng(1).standard_normal((4, 4, 6, 4)).astype('f')
    cond, t = small_cond(4), jnp.asarray([0.2, 0.4, 0.6, 0.8])

    def gradient(mesh, params, x, cond):
        predict = sdxl.make_denoiser(SMALL, mesh=mesh)
        return jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(predict(p, x, t, cond)))))(params)

    rows = lambda a: jax.device_put(a, sharding.batch_sharding(mesh))
    one = gradient(None, small_params(), x, cond)
    many = gradient(mesh, jax.device_put(small_params(), layout), rows(x),
                    jax.tree.map(rows, cond))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), many, one)


if __name__ == '__main__':
    compare_meshes()
