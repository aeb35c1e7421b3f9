"""Sizes and numbers of a published config.json: each is one, or the field is named in one line."""

import dataclasses
import json

import published
import published_sdxl
import published_text
import published_zimage
import pytest

from ddmd_jax.families import published_flow, published_vae
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.families.sdxl import teacher as sdxl
from ddmd_jax.families.zimage import teacher as zimage
from ddmd_jax.weights.flat import WeightsError

SIZES = (-1, 0, 10**9, 10**400, 'big', True, None, 2.5, float('nan'), [], {}, 1e9)
NUMBERS = (-1.0, 0, 1e31, 10**400, 'big', True, float('nan'), float('inf'), [], {})
FLOW = {'lumina': (lumina.FLOW, published.TRANSFORMER),
        'zimage': (zimage.FLOW, published_zimage.TRANSFORMER)}
UNET = published_sdxl.UNET | {'in_channels': 4, 'out_channels': 4, 'norm_eps': 1e-5}


def text(family, folder):
    """(what reads a config, the config) of a text encoder."""
    component = next(c for c in published_text.PIPELINES[family].components if c.folder == folder)

    def act(config):
        try:
            component.config(config, 'float32')
        except (KeyError, TypeError, ValueError) as e:  # which whoever opens the folder catches
            raise WeightsError(str(e)) from e

    return act, published_text.COMPONENTS[family][folder][1]


READERS = {
    **{name: (lambda c, flow=flow: published_flow.model_config(flow, c), config)
       for name, (flow, config) in FLOW.items()},
    'sdxl': (sdxl.model_config, UNET),
    'vae': (lambda c: published_vae.vae_config(c, 'float32'), published.VAE),
    'gemma': text('lumina', 'text_encoder'), 'qwen': text('zimage', 'text_encoder'),
    'clip': text('sdxl', 'text_encoder')}


@pytest.mark.parametrize('name, field', [
    *(('lumina', field) for field in (
        'patch_size', 'in_channels', 'hidden_size', 'num_layers', 'num_refiner_layers',
        'num_attention_heads', 'num_kv_heads', 'multiple_of', 'cap_feat_dim')),
    *(('zimage', field) for field in (
        'in_channels', 'dim', 'n_layers', 'n_refiner_layers', 'n_heads', 'cap_feat_dim')),
    *(('sdxl', field) for field in (
        'in_channels', 'layers_per_block', 'cross_attention_dim', 'addition_time_embed_dim',
        'projection_class_embeddings_input_dim', 'norm_num_groups')),
    *(('vae', field) for field in ('latent_channels', 'layers_per_block', 'sample_size')),
    *((name, field) for name in ('gemma', 'qwen', 'clip') for field in (
        'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
        'num_attention_heads')), ('gemma', 'head_dim'), ('gemma', 'sliding_window')])
def test_a_size_is_a_whole_number_that_there_is(name, field):
    refused(name, field, SIZES)


@pytest.mark.parametrize('name, field', [
    ('lumina', 'norm_eps'), ('zimage', 'rope_theta'), ('zimage', 't_scale'), ('sdxl', 'norm_eps'),
    ('vae', 'scaling_factor'), ('gemma', 'rms_norm_eps'), ('gemma', 'query_pre_attn_scalar'),
    ('gemma', 'rope_theta'), ('clip', 'layer_norm_eps')])
def test_a_number_is_one_in_float32(name, field):
    refused(name, field, NUMBERS)


@pytest.mark.parametrize('name, field, values', [
    ('sdxl', 'block_out_channels', ([0], [16, -1], [10**9, 32], 'ab', 16)),
    ('sdxl', 'transformer_layers_per_block', ([1, 10**9], [1, -1], [1, 2.5])),
    ('vae', 'block_out_channels', ([], [8, True], ['8'])), ('vae', 'use_quant_conv', ('no', 1)),
    ('lumina', 'axes_dim_rope', ([4, 4, -8], [4, 4, 'x'], 12)),
    ('lumina', 'ffn_dim_multiplier', (1e-9, -1.0, 'x')), ('zimage', 'axes_dims', ([], [8, 8, 0])),
    ('qwen', 'rope_parameters', (3, 'x', [1], {'rope_theta': -1}))])
def test_what_is_several_or_may_be_absent(name, field, values):
    refused(name, field, values)


def refused(name, field, values):
    read, config = READERS[name]
    read(json.loads(json.dumps(config)))
    for value in values:
        with pytest.raises(WeightsError) as e:
            read({**json.loads(json.dumps(config)), field: value})
        assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 400, value


# --- Schedulers ---


@pytest.mark.parametrize('field, values', [
    ('num_train_timesteps', (0, -1, 10**9, 2.5, True, None, 'x')),
    ('steps_offset', (-1, 10**9, 2.5, True, None, 'x', [1])),
    ('timestep_spacing', ('big', 3, True, [])), ('beta_start', (0, -1, 'x', float('nan'), None)),
    ('beta_schedule', (3, None, 'squaredcos_cap_v2'))])
def test_a_table_of_steps_is_one(tmp_path, field, values):
    file = tmp_path / 'scheduler_config.json'
    for value in values:
        file.write_text(json.dumps(published_sdxl.SCHEDULER | {field: value}))
        with pytest.raises(WeightsError):
            sdxl.table_of(file)


@pytest.mark.parametrize('fields, told', [
    ({'_class_name': 'EulerDiscreteScheduler', 'timestep_spacing': None}, "not of 'linspace'"),
    ({'_class_name': 'DDIMScheduler', 'timestep_spacing': None}, ''),
    ({'_class_name': 'DPMSolverMultistepScheduler', 'use_karras_sigmas': True}, "not Karras's")])
def test_a_sampler_of_other_steps_is_told(tmp_path, capsys, fields, told):
    """Also where the config says nothing, and its class does."""
    file = tmp_path / 'scheduler_config.json'
    file.write_text(json.dumps(published_sdxl.SCHEDULER | fields))
    assert sdxl.table_of(file) == sdxl.TABLE
    err = capsys.readouterr().err
    assert told in err and bool(told) == bool(err)


def test_a_spacing_that_is_not_known_here_is_told(tmp_path, capsys):
    file = tmp_path / 'scheduler_config.json'
    file.write_text(json.dumps(published_sdxl.SCHEDULER | {'timestep_spacing': 'linspace'}))
    assert sdxl.table_of(file) == sdxl.TABLE
    assert "takes the steps of 'leading' here, not of 'linspace'" in capsys.readouterr().err


def test_a_student_that_begins_within_the_table_is_of_that_table(tmp_path):
    """As `export` writes one of step 399; other betas are another process's."""
    file = tmp_path / 'scheduler_config.json'
    betas = sdxl.TABLE.betas[:400].tolist()
    file.write_text(json.dumps(published_sdxl.SCHEDULER | {
        'trained_betas': betas, 'num_train_timesteps': 400}))
    assert sdxl.table_of(file) == dataclasses.replace(sdxl.TABLE, first=399)
    file.write_text(json.dumps(published_sdxl.SCHEDULER | {'trained_betas': [0.1, *betas[1:]]}))
    with pytest.raises(WeightsError, match='trained_betas is .*, supported is None'):
        sdxl.table_of(file)


@pytest.mark.parametrize('config, shift, told', [
    ({'_class_name': 'FlowMatchEulerDiscreteScheduler', 'shift': 3.0}, 3.0, ''),
    ({'_class_name': 'UniPCMultistepScheduler', 'use_flow_sigmas': True, 'flow_shift': 5.0}, 5.0,
     ''),
    ({'shift': 6.0, 'use_karras_sigmas': True, 'shift_terminal': 0.1}, 6.0,
     'without use_karras_sigmas, shift_terminal'),
    ({'_class_name': 'DPMSolverMultistepScheduler'}, None, 'has a DPMSolverMultistepScheduler')])
def test_the_shift_of_a_flow_is_in_its_schedulers_own_words(tmp_path, capsys, config, shift, told):
    """Also for a transformer that lies in its pipeline's folder."""
    for folder in ('scheduler', 'transformer'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'model_index.json').write_text('{}')
    (tmp_path / 'scheduler/scheduler_config.json').write_text(json.dumps(config))
    for folder in (tmp_path, tmp_path / 'transformer'):
        if shift is None:
            with pytest.raises(WeightsError, match=told):
                published_flow.shift_of(lumina.FLOW, folder)
            continue
        assert published_flow.shift_of(lumina.FLOW, folder) == shift
        err = capsys.readouterr().err
        assert told in err and bool(told) == bool(err)


def test_a_unet_in_its_pipelines_folder_is_of_that_process(tmp_path):
    for name, content in {
            'model_index.json': {'_class_name': 'StableDiffusionXLPipeline'},
            'unet/config.json': published_sdxl.UNET | {'_class_name': sdxl.UNET},
            'scheduler/scheduler_config.json': published_sdxl.SCHEDULER | {
                'prediction_type': 'v_prediction'}}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(WeightsError, match='prediction_type is v_prediction, supported is epsilon'):
        sdxl.open_folder(tmp_path / 'unet')


@pytest.mark.parametrize('field', ['force_zeros_for_empty_prompt', 'requires_aesthetics_score'])
def test_a_flag_of_the_pipelines_index_is_no_text(tmp_path, field):
    (tmp_path / 'model_index.json').write_text(json.dumps(
        {'_class_name': 'StableDiffusionXLPipeline', field: 'False'}))
    with pytest.raises(WeightsError, match=f"{field} is 'False', not true or false or null"):
        sdxl.open_folder(tmp_path)
