"""The embedded teacher's students: network and codec are published ones, the text side is code."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families.emoji import codec, teacher as emoji, words
from ddmd_jax.families.emoji.drawings import SETS
from ddmd_jax.families.family import Export, Exported, Source
from ddmd_jax.families.lumina import names, teacher as lumina
from ddmd_jax.util import files
from ddmd_jax.weights import diffusers, flat, scheduler
from ddmd_jax.weights.lora import Names
from ddmd_jax.weights.names import Entry

CODE = Path(__file__).with_name('code')
USE = """from diffusers import DiffusionPipeline

# Its text side is code in this folder: read it, then say that you trust it.
pipe = DiffusionPipeline.from_pretrained('{folder}', trust_remote_code=True)
pipe('a cat left of a red apple on a teal background').images[0].save('cat.png')
"""
ALONE = """# Euler steps, the deterministic sampler; of the run: `sample --checkpoint=WORKDIR`.
python -m ddmd_jax.sample --teacher --teacher_path={folder}/student.safetensors \\
    --steps={steps} --guidance=1 --out=cat.png \\
    --prompt='a cat left of a red apple on a teal background'
"""
USE_ADAPTERS = """# A run that begins at it; of the run that made it: `sample --checkpoint=WORKDIR`.
python -m ddmd_jax.main --config=emoji --config.student.adapter.kind=lora \\
    --config.init_from={folder} --workdir=DIR
"""
# Fields of the architecture under their published names; the rest are the published defaults.
FIELDS = ('patch_size', 'in_channels', 'hidden_size', 'num_layers', 'num_refiner_layers',
          'num_attention_heads', 'num_kv_heads', 'multiple_of', 'ffn_dim_multiplier', 'norm_eps',
          'axes_dim_rope', 'cap_feat_dim')


def open_source(path: str) -> Source:
    """Raises `WeightsError`: missing, damaged, no emoji teacher, or one of another codec."""
    model, params = emoji.read(path)
    denoiser, _ = emoji.model_configs(model)
    config = {'_class_name': lumina.TRANSFORMER, 'sample_size': codec.load().latents.shape[0]} | {
        name: value for name, value in dataclasses.asdict(denoiser).items() if name in FIELDS}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params['denoiser'])
    return Source(flat.identity(params), abstract, emoji.RULES, Shift(emoji.SHIFT), config,
                  own=(model, params['text']))


def write_weights(student: Exported, out: Path) -> None:
    """``OUT/student.safetensors``, which `teacher.path` and `init_from` read."""
    model, text = student.source.own
    emoji.save(out / 'student.safetensors', model, {'denoiser': student.params, 'text': text},
               student.step, jnp.dtype(student.dtype))


def write_pipeline(student: Exported, out: Path) -> None:
    """A pipeline of its own, with its codec and the code of its text encoder."""
    (model, text), space = student.source.own, codec.load()
    _, text_cfg = emoji.model_configs(model)
    dtype = jnp.dtype(student.dtype)
    lumina.export(student.params, student.source.config, out / 'transformer', dtype)
    codec.export(space.config, space.params, out / 'vae', dtype)
    encoder = {'_class_name': 'CaptionEncoder', **dataclasses.asdict(text_cfg)}
    diffusers.export_tree(text, caption_encoder_entry, out / 'text_encoder', encoder, dtype)
    shutil.copyfile(CODE / 'caption_encoder.py', out / 'text_encoder' / 'caption_encoder.py')
    shutil.copyfile(CODE / 'pipeline.py', out / 'pipeline.py')
    _write_tokenizer(out / 'tokenizer', text_cfg.max_length)
    write_scheduler(student, out)
    scheduler.write_index(out, ['pipeline', 'EmojiPipeline'], {
        'transformer': ['diffusers', lumina.TRANSFORMER],
        'vae': ['diffusers', 'AutoencoderKL'],
        'text_encoder': ['caption_encoder', 'CaptionEncoder'],
        'tokenizer': ['transformers', 'PreTrainedTokenizerFast'],
        'scheduler': ['diffusers', scheduler.CLASS]},
        steps=student.steps, time_scale=emoji.TIME_SCALE)


def write_scheduler(student: Exported, out: Path) -> None:
    scheduler.write(out / 'scheduler', student.shift, student.sampler)


def _write_tokenizer(folder: Path, length: int) -> None:
    folder.mkdir()
    words.load().save(str(folder / 'tokenizer.json'))
    files.write(folder / 'tokenizer_config.json', json.dumps({
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': length,
        'padding_side': 'right', 'truncation_side': 'right', 'pad_token': words.PAD,
        'unk_token': words.UNK, 'bos_token': words.BOS}, indent=2) + '\n')


def caption_encoder_entry(path: str) -> Entry:
    """Name in `code/caption_encoder.py` of our parameter, e.g. ``layers/to_qkv/kernel``."""
    module, _, leaf = path.rpartition('/')
    if not module:
        return Entry(leaf)
    layout = 'linear' if leaf == 'kernel' else 'same'
    stack, _, inner = module.partition('/')
    name = f'layers.{{}}.{inner.replace("/", ".")}' if stack == 'layers' else module
    return Entry(f'{name}.weight', layout)


CREDITS = ('It was trained on drawings, and pictures here may show them: ' + '; '.join(
    f'{icons.vendor} ({icons.licence})' for icons in SETS)
    + '. They were reduced, mirrored and put on backgrounds. Attribution, sources and licences: '
    '`families/emoji/files/drawings/LICENSES.md` of ddmd_jax.')
EXPORT = Export(
    open_source, write_weights, names={
        'diffusers': ('transformer', 'vae', 'text_encoder', 'tokenizer', 'scheduler',
                      'pipeline.py', 'model_index.json'),
        'safetensors': ('student.safetensors',)},
    alone=ALONE, write_pipeline=write_pipeline, use=USE,
    adapters=Names('transformer', names.transformer), write_scheduler=write_scheduler,
    use_adapters=USE_ADAPTERS, credits=CREDITS)
