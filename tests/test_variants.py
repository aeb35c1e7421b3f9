"""Folders that come in a variant (``*.fp16.safetensors``), as diffusers writes and reads them."""

import shutil
import sys

import jax
import numpy as np
import published
import published_text
import pytest
import safetensors.numpy
from saved import save
from test_evaluate import command  # noqa: F401 a fixture

from ddmd_jax import config as config_lib, families, sample
from ddmd_jax.export import write as export
from ddmd_jax.families import LoadOptions
from ddmd_jax.parallel import sharding
from ddmd_jax.train import distillation, prompts
from ddmd_jax.weights import diffusers as ours, flat
from ddmd_jax.weights.flat import WeightsError

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch')
diffusers = pytest.importorskip('diffusers')

LUMINA = families.get('lumina')
NETWORK, CODEC, ENCODER = 'transformer', 'vae', 'text_encoder'
STEMS = {NETWORK: ours.STEM, CODEC: ours.STEM, ENCODER: 'model'}
FILE = '{}/{}.fp16.safetensors'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """(the pipeline in fp16 without a variant, as the variant fp16), the latter's parts small."""
    bare = published.pipeline()
    whole = diffusers.Lumina2Pipeline(
        transformer=bare.transformer, vae=bare.vae, scheduler=bare.scheduler,
        tokenizer=published_text.tokenizer('lumina'), **published_text.models('lumina'))
    whole.to(torch.float16)
    plain, variant = (tmp_path_factory.mktemp(name) for name in ('plain', 'variant'))
    whole.save_pretrained(plain)
    whole.save_pretrained(variant, variant='fp16')
    shutil.rmtree(variant / NETWORK)
    whole.transformer.save_pretrained(variant / NETWORK, variant='fp16', max_shard_size='100KB')
    return plain, variant


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / 'pipe')


def load(folder, variant=''):
    options = LoadOptions(str(folder), size=(16, 16), variant=variant)
    return LUMINA.load_teacher(options), LUMINA.load_text(options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_read_is_what_diffusers_wrote(written):
    """Network (in parts, with its index), codec and text encoder, bit by bit."""
    plain, variant = written
    assert (variant / NETWORK / f'{ours.STEM}.safetensors.index.fp16.json').is_file()
    assert len(list((variant / NETWORK).glob(f'{ours.STEM}.fp16-*.safetensors'))) > 1
    assert (variant / FILE.format(CODEC, ours.STEM)).is_file()
    assert (variant / FILE.format(ENCODER, 'model')).is_file()
    (a, a_text), (b, b_text) = load(plain), load(variant, 'fp16')
    same(a.params, b.params)
    same(a_text.params, b_text.params)
    latents = np.random.default_rng(0).normal(size=(1, *a.latents.shape)).astype('f')
    same(a.latents.decode(latents), b.latents.decode(latents))
    # The names of files are no part of an identity: a teacher may be called otherwise and resume.
    assert (a.identity, a_text.identity) == (b.identity, b_text.identity)
    assert LUMINA.text_identity(str(variant), 'fp16') == a_text.identity
    again = families.load_teacher(str(variant), size=(16, 16), variant='fp16')
    assert again.identity == a.identity
    for component, stem in STEMS.items():
        assert ours.variants(variant / component, stem) == ['fp16']
        assert ours.variants(plain / component, stem) == ['']


def test_an_evaluation_goes_on_with_the_codec_and_encoder_it_had(
        folder, command, tmp_path):  # noqa: F811
    """Its manifest names them beside the network: images are made by all three."""
    args = [f'--model={folder}', '--variant=fp16', '--suite=tests.evaluate_suites.TOY',
            '--count=1,0', '--size=16,16', '--teacher_steps=1', '--rows=teacher_guided',
            f'--out={tmp_path / "out"}']
    assert command(*args) == 0 and command(*args) == 0
    for component, name in ((CODEC, 'codec'), (ENCODER, 'text')):
        file = folder / FILE.format(component, STEMS[component])
        before, tensors = file.read_bytes(), safetensors.numpy.load_file(file)
        safetensors.numpy.save_file({k: x + np.float16(0.01) if x.ndim else x
                                     for k, x in tensors.items()}, file, {'format': 'pt'})
        said = command(*args)
        assert isinstance(said, str) and f'holds images of {name} ' in said
        file.write_bytes(before)


@pytest.mark.parametrize('component', STEMS)
def test_a_folder_of_variants_alone_says_what_to_name(written, folder, component):
    for other in set(STEMS) - {component}:
        shutil.rmtree(folder / other)
        shutil.copytree(written[0] / other, folder / other)
    with pytest.raises(WeightsError) as e:
        load(folder)
    assert len(str(e.value).splitlines()) == 1 and 'fetch' not in str(e.value)
    assert f'{folder / component} has no {STEMS[component]}.safetensors' in str(e.value)
    assert 'config.teacher.variant=fp16' in str(e.value) and '--variant=fp16' in str(e.value)


def test_a_variant_that_is_not_there_is_no_other(written, folder):
    for there, has in ((folder, 'it comes in fp16'), (written[0], 'one without a name')):
        with pytest.raises(WeightsError, match=f'has no variant fp61: .*{has}'):
            load(there, 'fp61')


def test_codec_and_encoder_may_come_without(written, folder, capsys):
    """As in diffusers; a line says so."""
    for component in (CODEC, ENCODER):
        shutil.rmtree(folder / component)
        shutil.copytree(written[0] / component, folder / component)
    (_, text), (_, whole) = load(folder, 'fp16'), load(*written[1:], 'fp16')
    assert text.identity == whole.identity
    warned = capsys.readouterr().err
    assert [f'{folder / c} has no variant fp16' in warned for c in STEMS] == [False, True, True]
    with pytest.raises(WeightsError, match='/vae has no diffusion_pytorch_model.fp16.safetensors'):
        (folder / CODEC / f'{ours.STEM}.safetensors').unlink()
        load(folder, 'fp16')


def test_the_names_of_early_parts_are_known(folder):
    """diffusers wrote them so before it wrote as transformers does."""
    before = load(folder, 'fp16')[0].identity
    index = folder / NETWORK / f'{ours.STEM}.safetensors.index.fp16.json'
    content = index.read_text()
    index.unlink()
    for file in (folder / NETWORK).glob('*.safetensors'):
        early = file.name.replace('.fp16-', '-').replace('.safetensors', '.fp16.safetensors')
        content = content.replace(file.name, early)
        file.rename(file.with_name(early))
    (folder / NETWORK / f'{ours.STEM}.safetensors.fp16.index.json').write_text(content)
    assert ours.variants(folder / NETWORK, ours.STEM) == ['fp16']
    assert load(folder, 'fp16')[0].identity == before


def test_a_run_a_picture_and_an_export_take_the_runs_variant(written, folder, tmp_path):
    config = config_lib.load('lumina')
    config.teacher.path, config.teacher.variant = str(folder), 'fp16'
    config.data.sizes, config.data.name = ((16, 16),), 'prompts'
    config_lib.check(config)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    teacher = distillation.load_teacher(config, mesh)
    assert prompts.text_of(config, teacher, mesh).identity == load(written[0])[1].identity
    run = save(tmp_path / 'run', {
        'task': 'distill', 'teacher.name': 'lumina', 'teacher.path': str(folder),
        'teacher.variant': 'fp16', 'student.steps': 1, 'teacher_identity': teacher.identity,
        'data.name': 'prompts'}, teacher.params)
    assert sample.find_model(run, '', None).variant == 'fp16'
    assert sample.find_model(run, str(written[0]), None, variant='').variant == ''

    # Nothing has to be named to read what is exported, by diffusers or by us.
    export.export(run, tmp_path / 'out', export.Wanted(dtype='float16'))
    assert not [x for x in (tmp_path / 'out').rglob('*fp16.safetensors')]
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'out', torch_dtype=torch.float16)
    want = diffusers.DiffusionPipeline.from_pretrained(written[0], torch_dtype=torch.float16)
    for part in (NETWORK, CODEC, ENCODER):
        theirs = getattr(want, part).state_dict()
        for name, tensor in getattr(back, part).state_dict().items():
            assert torch.equal(tensor, theirs[name]), (part, name)
    assert load(tmp_path / 'out')[1].identity == load(written[0])[1].identity
    with pytest.raises(WeightsError, match='has no variant fp16: it comes in one without a name'):
        export.export(run, tmp_path / 'moved', export.Wanted(teacher=str(written[0])))
    export.export(run, tmp_path / 'moved', export.Wanted(teacher=str(written[0]), variant=''))
    same(*(flat.flatten(load(tmp_path / name)[0].params) for name in ('out', 'moved')))


def test_no_variant_of_what_has_none():
    with pytest.raises(WeightsError, match='weights of emoji have no variants; leave out fp16'):
        families.get('emoji').load_teacher(LoadOptions(variant='fp16'))
    with pytest.raises(WeightsError, match="variant '../x' must be '' or a part of a file's name"):
        LUMINA.load_text(LoadOptions('/nowhere', variant='../x'))
    for name, variant, words in (('emoji', 'fp16', "must be '' for emoji, whose weights have no"),
                                 ('lumina', '../x', "must be '' or a part of a file's name"),
                                 ('lumina', None, "must be '' or a part of a file's name")):
        config = config_lib.load(name)
        config.teacher.path = 'owner/name' if name == 'lumina' else ''
        with config.ignore_type():
            config.teacher.variant = variant
        with pytest.raises(config_lib.ConfigError, match=f'teacher.variant: .*{words}'):
            config_lib.check(config)


def test_sentencepiece_that_is_missing_is_asked_for(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    (folder / 'tokenizer/tokenizer.json').unlink()
    (folder / 'tokenizer/tokenizer.model').write_bytes(b'a model of sentencepiece')
    with pytest.raises(WeightsError) as e:
        load(folder, 'fp16')
    assert 'pip install sentencepiece' in str(e.value) and 'fetch' not in str(e.value)
    assert len(str(e.value).splitlines()) == 1
