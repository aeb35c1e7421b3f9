"""Real images to latents on disk: what is written is what the codec makes of the right pixels."""

import codecs
import errno
import io
import json
import os
import shutil
import struct
import tarfile

import jax
import numpy as np
import published_sdxl
import published_text
import pytest
from absl import flags
from PIL import Image
from test_sdxl import written

from ddmd_jax import families, imaging, prepare
from ddmd_jax.config import load
from ddmd_jax.data import DataFileError
from ddmd_jax.data.batch import CondSpec
from ddmd_jax.data.images import cache, pixels, sources
from ddmd_jax.data.images.pixels import BadImage
from ddmd_jax.data.prompts import files
from ddmd_jax.diffusion.time import StepTable
from ddmd_jax.evaluation import kept
from ddmd_jax.families import LoadOptions, published_vae
from ddmd_jax.families.base import Latents, Teacher
from ddmd_jax.models import autoencoder_kl
from ddmd_jax.parallel import sharding
from ddmd_jax.train import prompts
from ddmd_jax.util import commands
from ddmd_jax.util.errors import UserError
from ddmd_jax.util.places import PlaceError
from ddmd_jax.weights import diffusers
from ddmd_jax.weights.flat import WeightsError

SIZES = ((16, 16), (16, 24))
VAE = {'_class_name': 'AutoencoderKL', **published_sdxl.VAE}


def write_vae(folder, seed=0):
    """A codec's folder, of random weights."""
    shapes = autoencoder_kl.abstract_params(published_vae.vae_config(VAE, 'float32'))
    diffusers.export_tree(published_text.random_params(shapes, seed), published_vae.entry, folder,
                          VAE, np.float32)


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
    """A pipeline's folder as far as images need it: no weights of a U-Net."""
    folder = written(tmp_path_factory.mktemp('pipe'), {})
    write_vae(folder / 'vae')
    return folder


@pytest.fixture(scope='module')
def mesh():
    return sharding.make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope='module')
def encoder(pipeline, mesh):
    return families.get('sdxl').load_images(LoadOptions(str(pipeline), mesh))


def picture(seed, height=20, width=18, kind='PNG', mode='RGB'):
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 255, (height, width, len(mode)), np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours, mode).save(out, kind)
    return out.getvalue()


def fill(folder, count=6, captions=True):
    """Images by number, every third of them wide; what they are called."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f'{i}.png').write_bytes(picture(i, width=40 if i % 3 == 2 else 18))
        if captions:
            (folder / f'{i}.txt').write_text(f'image  number {i}\n')
    return folder


def encode(folder, encoder, mesh, out, share=(0, 1), **wanted):
    return asked(sources.open_source([str(folder)]), encoder, mesh, out, share, **wanted)[0]


def asked(source, encoder, mesh, out, share=(0, 1), **wanted):
    """The card, and whether it was there already."""
    wanted = imaging.Wanted(SIZES, **({'rows': 2, 'part': 4} | wanted))
    return imaging.encode(source, encoder, wanted, mesh, out, share)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def command():
    """``command(*args)``: the exit code of `prepare images` in this process, or what it says."""
    before = set(flags.FLAGS)
    prepare.images_flags()
    mine = set(flags.FLAGS) - before

    def call(*args):
        for name in mine:
            flags.FLAGS[name].unparse()
        flags.FLAGS.unparse_flags()
        try:
            rest = commands.parser('prepare')(['prepare', *args])
            commands.call('prepare', lambda _: prepare.images(), rest)
        except SystemExit as e:
            return e.code
        return 0

    yield call
    flags.FLAGS.unparse_flags()
    for name in mine:
        delattr(flags.FLAGS, name)


# --- Latents ---


def test_a_folder_becomes_latents_with_captions(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in')
    card = encode(images, encoder, mesh, tmp_path / 'out')
    assert [p.name for p in sorted(tmp_path.iterdir())] == ['in', 'out']
    assert card['count'] == 6 and card['of_each_size'] == [4, 2] and len(card['files']) == 2
    stored = cache.ImageCache(tmp_path / 'out')
    assert stored.codec == encoder.identity and stored.identity == card['identity']
    assert stored.shapes == [(8, 8, 4), (8, 12, 4)] and stored.buckets.tolist() == [0, 0, 1] * 2
    assert (stored[4], stored.name(4), len(stored)) == ('image number 4', '4.png', 6)
    # The middle of the image, scaled so that it is just covered; the noise is by its number.
    for row in (1, 5):
        size = SIZES[stored.buckets[row]]
        image = Image.open(images / f'{row}.png')
        scale = max(size[0] / image.height, size[1] / image.width)
        scaled = image.resize((round(image.width * scale), round(image.height * scale)),
                              Image.Resampling.LANCZOS)
        left, top = (scaled.width - size[1]) // 2, (scaled.height - size[0]) // 2
        middle = np.asarray(scaled)[top:top + size[0], left:left + size[1]]
        want = encoder.run(encoder.params, np.stack([middle] * 2), np.uint32([row, row]),
                           jax.random.key(0), False)
        np.testing.assert_allclose(stored.latents([row]), want[:1], atol=2e-3)
    assert stored.latents([4, 0]).dtype == np.float32 and stored.latents([2, 5]).shape[2] == 12


def test_stopped_work_goes_on_and_ends_alike(tmp_path, encoder, mesh, monkeypatch):
    """After the last whole part; and a finished folder is done, whatever lies beside it."""
    images = fill(tmp_path / 'in')
    encode(images, encoder, mesh, tmp_path / 'whole')
    read, seen = imaging._Encoding.read, []

    def killed(self, entry):
        seen.append(entry[0])
        if entry[0] == 5:
            raise KeyboardInterrupt
        return read(self, entry)

    monkeypatch.setattr(imaging._Encoding, 'read', killed)
    with pytest.raises(KeyboardInterrupt):
        encode(images, encoder, mesh, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(DataFileError, match='it is half written'):
        cache.ImageCache(tmp_path / 'out')
    monkeypatch.setattr(imaging._Encoding, 'read',
                        lambda self, entry: seen.append(entry[0]) or read(self, entry))
    seen.clear()
    encode(images, encoder, mesh, tmp_path / 'out')
    assert sorted(seen) == [4, 5] and contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    seen.clear()
    assert encode(images, encoder, mesh, tmp_path / 'out')['count'] == 6 and not seen
    with pytest.raises(DataFileError, match='made otherwise .seed: 0 -> 1'):
        encode(images, encoder, mesh, tmp_path / 'out', seed=1)


def table(path, **columns):
    path.write_text(''.join(json.dumps(dict(zip(columns, row))) + '\n'
                            for row in zip(*columns.values())))
    return str(path)


def change_nothing(images, captions):
    return captions, {}


def other_field(images, captions):
    return captions, {'caption': 'long'}


def other_table(images, captions):
    return shutil.copy(captions, images.parent / 'other.jsonl'), {}


def no_table(images, captions):
    for i in range(6):
        (images / f'{i}.txt').write_text('beside')
    return '', {}


def other_folder(images, captions):
    return shutil.copytree(images, images.parent / 'copy'), {}  # as its name says


def caption_mended(images, captions):
    file = images.parent / 'captions.jsonl'
    file.write_text(file.read_text().replace('short 5', 'mended!'))
    return captions, {}


def image_mended(images, captions):
    (images / '1.png').write_bytes(picture(9))
    return captions, {}


def image_added(images, captions):
    (images / '7.png').write_bytes(picture(9))
    return captions, {}


@pytest.mark.parametrize('change, words', [
    (change_nothing, ''), (other_field, 'otherwise .field: caption -> long'),
    (other_table, r'otherwise .captions: captions.jsonl -> other.jsonl'),
    (no_table, r'otherwise .captions: captions.jsonl -> NAME.txt'),
    (other_folder, r"otherwise .input: \['in'\] -> \['copy'\]"),
    (caption_mended, r'changed since .captions of 4.png to 5.png'),
    (image_mended, r'changed since .images of 0.png to 3.png'),
    (image_added, 'images: 6 -> 7')], ids=lambda x: getattr(x, '__name__', ''))
@pytest.mark.parametrize('half', [False, True], ids=['whole', 'half'])
def test_a_folder_is_of_one_request(tmp_path, encoder, mesh, change, words, half):
    """Another one is refused; a half written folder goes on after its inputs were mended, and ends
    as if it had been written at once."""
    images = fill(tmp_path / 'in', captions=False)
    names = [f'{i}.png' for i in range(6)]
    captions = table(tmp_path / 'captions.jsonl', file_name=names,
                     caption=[f'short {i}' for i in range(6)], long=[f'long {i}' for i in range(6)])
    opened = lambda folder, of, fields: sources.open_source(
        [str(folder)], of, sources.Fields(**fields))
    # Of two processes one leaves the folder half written.
    first, _ = asked(opened(images, captions, {}), encoder, mesh, tmp_path / 'out',
                     share=(0, 2 if half else 1))
    assert (first is None) == half
    again, fields = change(images, captions)
    if change is other_folder:
        images, again = again, captions
    call = lambda out: asked(opened(images, again, fields), encoder, mesh, tmp_path / out)
    if not words:
        card, there = call('out')
        assert (card['count'], there) == (6, not half) and (half or card == first)
    elif half and 'since' in words:
        # The first part alone was there; it is written again where its own files have changed.
        assert call('out')[0] == call('fresh')[0]
        assert contents(tmp_path / 'out') == contents(tmp_path / 'fresh')
    else:
        before = contents(tmp_path / ('out.parts' if half else 'out'))
        with pytest.raises(DataFileError, match=words) as e:
            call('out')
        said = str(e.value)
        assert len(said.splitlines()) == 1 and 'choose another --out or delete it' in said
        assert contents(tmp_path / ('out.parts' if half else 'out')) == before


def test_a_folder_that_left_out_more_is_not_done(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in', 3)
    (images / '1.txt').write_text('')
    encode(images, encoder, mesh, tmp_path / 'out', max_bad=0.5)
    with pytest.raises(DataFileError, match='1 left out .1.png has no caption.: more than --max_b'):
        encode(images, encoder, mesh, tmp_path / 'out', max_bad=0.1)
    (images / '1.txt').write_text('mended')
    with pytest.raises(DataFileError, match='changed since .captions of 0.png to 2.png.; choose'):
        encode(images, encoder, mesh, tmp_path / 'out', max_bad=0.5)


def test_a_half_written_folder_that_says_nothing_is_one_line(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in', 6)
    encode(images, encoder, mesh, tmp_path / 'out', (0, 2))
    parts = tmp_path / 'out.parts'
    (parts / 'images-00000.json').write_text('[]')  # made again
    for text in ('', '[]', '{"seed": 0}', '{"settings": [], "asked": {}}'):
        (tmp_path / 'settings.json').write_bytes((parts / 'settings.json').read_bytes())
        (parts / 'settings.json').write_text(text)
        with pytest.raises(DataFileError, match='does not say what .* is of .*choose another'):
            encode(images, encoder, mesh, tmp_path / 'out')
        shutil.move(tmp_path / 'settings.json', parts / 'settings.json')
    assert encode(images, encoder, mesh, tmp_path / 'out')['count'] == 6


def test_any_number_of_processes_writes_the_same(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in')
    encode(images, encoder, mesh, tmp_path / 'one')
    assert encode(images, encoder, mesh, tmp_path / 'two', (1, 2)) is None
    assert encode(images, encoder, mesh, tmp_path / 'two', (0, 2))['count'] == 6
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


def test_another_process_may_begin_a_folder_at_the_same_time(tmp_path, monkeypatch):
    begin, replace, others = lambda: cache.Parts(tmp_path / 'out', {}, {}, []), os.replace, []

    def after_another(*given):
        if not others:
            others.append(None)
            with monkeypatch.context() as m:
                m.setattr(os, 'getpid', os.getppid)
                others.append(begin())
        return replace(*given)

    monkeypatch.setattr(os, 'replace', after_another)
    assert begin().folder == others[1].folder
    assert [p.name for p in (tmp_path / 'out.parts').iterdir()] == ['settings.json']


def test_another_process_may_have_finished_the_folder_just_now(tmp_path, encoder, mesh,
                                                              monkeypatch):
    finish = cache.Parts.finish
    monkeypatch.setattr(cache.Parts, 'finish', lambda *given: finish(*given) and finish(*given))
    assert encode(fill(tmp_path / 'in', 2), encoder, mesh, tmp_path / 'out')['count'] == 2
    assert len(cache.ImageCache(tmp_path / 'out')) == 2


def test_bad_images_are_named_counted_and_left_out(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in')
    (images / '1.png').write_bytes(picture(1)[:90])
    (images / '3.png').write_bytes(picture(3, height=15))
    (images / '4.txt').write_text(' \n')
    (images / '5.txt').write_bytes(b'\xff\xfe\xff')
    with pytest.raises(DataFileError) as e:
        encode(images, encoder, mesh, tmp_path / 'out', max_bad=0.5)
    said = str(e.value)
    assert len(said.splitlines()) == 1 and 'of 6 images 4 left out (1.png cannot be decoded' in said
    assert '3.png is 15 x 18 pixels, smaller than the crop of 16 x 16' in said
    assert '4.png has no caption' in said and 'more than --max_bad=0.5' in said
    # Nothing is lost: a larger share takes what is written.
    card = encode(images, encoder, mesh, tmp_path / 'out', max_bad=0.7)
    assert card['count'] == 2 and card['left_out']['count'] == 4
    stored = cache.ImageCache(tmp_path / 'out')
    assert [stored[0], stored[1]] == ['image number 0', 'image number 2']
    assert stored.card['left_out']['first'][3][1].startswith('has a caption that cannot be read')


def test_means_are_no_samples(tmp_path, encoder, mesh):
    images = fill(tmp_path / 'in', 1)
    encode(images, encoder, mesh, tmp_path / 'a')
    encode(images, encoder, mesh, tmp_path / 'b', mean=True)
    a, b = (cache.ImageCache(tmp_path / name) for name in 'ab')
    assert a.identity != b.identity and np.abs(a.latents([0]) - b.latents([0])).max() > 1e-3


# --- Pixels ---


def test_pictures_of_every_mode_become_rgb():
    clear = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    out = io.BytesIO()
    clear.save(out, 'PNG')
    assert np.asarray(pixels.decode(out.getvalue())).min() == 255  # clear is white
    for mode in ('L', 'P', 'CMYK', '1'):
        out = io.BytesIO()
        Image.new(mode, (5, 3)).save(out, 'TIFF')
        assert pixels.decode(out.getvalue()).mode == 'RGB'
    turned = Image.new('RGB', (5, 3))
    out = io.BytesIO()
    turned.save(out, 'JPEG', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0'
                                  b'\0\0\0\0')
    assert pixels.decode(out.getvalue()).size == (3, 5)


def saved(image, kind='PNG', **more):
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = RAMP.astype(np.uint16) * 257


def tiff(changed, **entry):
    """A grey TIFF of 16 bits; one entry of its header `changed`, from a value to another."""
    (old, new), = entry.values()
    raw = saved(Image.fromarray(WIDE), 'TIFF')
    found = struct.pack('<HHII', changed, 3, 1, old)
    assert raw.count(found) == 1
    return raw.replace(found, struct.pack('<HHII', changed, 3, 1, new))


@pytest.fixture(params=['prepare', 'evaluate'])
def seen(request, tmp_path):
    """``seen(bytes)``: the levels that each command's reader sees, and what it raises."""
    def read(raw):
        if request.param == 'prepare':
            return np.asarray(pixels.decode(raw))
        (tmp_path / 'x.tif').write_bytes(raw)  # what a file is called does not count
        return next(iter(kept.Plain(tmp_path)))

    return read, BadImage if request.param == 'prepare' else kept.ImagesError


def test_grey_of_16_bits_is_the_same_grey(seen):
    read, error = seen
    big = Image.frombytes('I;16B', (16, 16), WIDE.astype('>u2').tobytes())
    clear = Image.fromarray(WIDE)
    for raw in (saved(Image.fromarray(RAMP)), saved(clear), saved(clear, 'PPM'),
                saved(clear, 'TIFF'), saved(clear, 'TIFF', compression='tiff_lzw'),
                saved(big, 'TIFF'), saved(big, 'TIFF', compression='tiff_lzw')):
        np.testing.assert_array_equal(read(raw), np.stack([RAMP] * 3, -1))
    turned = Image.Exif()
    turned[0x0112] = 6
    # As with 8 bits: turned, and white where the file says transparent; by no published scorer.
    prepared = error is BadImage
    np.testing.assert_array_equal(read(saved(clear, exif=turned))[..., 0],
                                  np.rot90(RAMP, -1) if prepared else RAMP)
    for one in (Image.fromarray(RAMP), clear):
        level = 7 if one.mode == 'L' else 7 * 257
        found = read(saved(one, transparency=level))
        assert (found[0, 7] == (255 if prepared else 7)).all() and (found[0, 6] == 6).all()


@pytest.mark.parametrize('raw, words', [
    (lambda: saved(Image.fromarray(RAMP / np.float32(255)), 'TIFF'), 'grey of floats'),
    (lambda: saved(Image.fromarray(RAMP.astype(np.int32)), 'TIFF'), 'grey of signed or 32-bit'),
    (lambda: tiff(258, bits=(16, 12)), 'grey of 12 bits'),
    (lambda: tiff(262, meaning=(1, 0)), 'grey of 16 bits whose 0 is white')],
    ids=['float', 'int32', 'twelve', 'inverted'])
def test_levels_that_do_not_say_what_is_white_are_refused(seen, raw, words):
    read, error = seen
    with pytest.raises(error, match=f'is {words}.*save it with 8 bits') as e:
        read(raw())
    assert len(str(e.value).splitlines()) == 1


def test_an_image_goes_to_the_nearest_aspect():
    sizes = ((1024, 1024), (832, 1216), (1216, 832))
    assert [pixels.bucket(size, sizes) for size in ((50, 51), (50, 70), (2000, 900))] == [0, 1, 2]


# --- Sources ---


def test_a_table_has_a_folders_captions(tmp_path):
    images = fill(tmp_path / 'in', 3, captions=False)
    rows = [{'file_name': f'./{i}.png', 'caption': f'from a table {i}'} for i in (0, 2)]
    (tmp_path / 't.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({'f': ['0.png', '2.png'], 'c': ['from a table 0', 'from a table 2']}),
                   tmp_path / 't.parquet')
    names = sources.Fields(caption='c', file='f')
    for table, fields in (('t.jsonl', sources.USUAL), ('t.parquet', names)):
        found = sources.open_source([str(images)], str(tmp_path / table), fields)
        assert [entry.caption() for entry in found] == ['from a table 0', '', 'from a table 2']


CAPTION = 'ein kleiner Bär, 猫'


@pytest.mark.parametrize('raw', [
    CAPTION.encode('utf-8-sig'), CAPTION.encode('utf-16'), CAPTION.encode('utf-32'),
    codecs.BOM_UTF16_BE + CAPTION.encode('utf-16-be')], ids=['8', '16', '32', '16-be'])
def test_captions_are_read_in_every_encoding_that_prompts_are(tmp_path, raw):
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / '0.png').write_bytes(picture(0))
    (folder / '0.txt').write_bytes(raw)
    code = 'utf-16' if len(raw) > 30 and not raw.startswith(b'\xef') else 'utf-8-sig'
    tar = pack(tmp_path / 'a.tar', {
        'k.png': picture(0), 'k.txt': raw, 'l.png': picture(1),
        'l.json': json.dumps({'caption': CAPTION}, ensure_ascii=False).encode(code)})
    found = sources.open_source([str(folder), str(tar)])
    assert [entry.caption() for entry in found] == [CAPTION] * 3
    assert [*files.read(folder / '0.txt', '')] == [CAPTION]


def test_captions_that_are_no_text_are_named(tmp_path, encoder, mesh):
    members = {f'{i}.png': picture(i) for i in range(6)} | {
        '0.txt': b'good', '1.txt': 'a cat'.encode('utf-16-le'), '2.txt': b'a\0b',
        '3.json': b'{"caption": ["a", "b"]}', '4.json': b'[' * 9999, '5.txt': b'\xe4'}
    folder = tmp_path / 'in'
    folder.mkdir()
    for name, raw in members.items():
        (folder / name).write_bytes(raw)
    for given, count in ((folder, 5), (pack(tmp_path / 'a.tar', members), 5)):
        out = tmp_path / f'{given.name}.out'
        card = encode(given, encoder, mesh, out, max_bad=1)
        reasons = [' '.join(x) for x in card['left_out']['first']]
        assert card['count'] == 1 and len(reasons) == count
        assert '1.txt line 1: it holds a NUL, so it is UTF-16 without its mark' in reasons[0]
        assert '2.txt line 1: it holds a NUL' in reasons[1] and 'not UTF-8' in reasons[4]
    assert "'caption' is ['a', 'b'], not a text" in reasons[2]
    assert 'nested more than 100 deep' in reasons[3]


def test_a_caption_has_one_image_and_an_image_one_caption(tmp_path):
    images = fill(tmp_path / 'in', 2, captions=False)
    other = fill(tmp_path / 'other', 1, captions=False)
    tar = pack(tmp_path / 'a.tar', {'k.png': picture(0), 'k.txt': b'x'})
    twice = table(tmp_path / 'twice.jsonl', file_name=['0.png', './0.png'], caption=['a', 'b'])
    alike = table(tmp_path / 'alike.jsonl', file_name=['0.png', './0.png'], caption=['a', ' a'])
    for inputs, captions, words in (
            ([images], twice, "names ./0.png twice, with 'a' and with 'b'; leave it one row"),
            ([images, other], alike, 'names 0.png, which is in two folders of --input'),
            ([tar], alike, 'is for the images of a folder, and --input names none')):
        with pytest.raises(DataFileError, match=words) as e:
            sources.open_source([*map(str, inputs)], captions)
        assert len(str(e.value).splitlines()) == 1
    assert sources.open_source([str(images)], alike)[0].caption() == 'a'
    pack(tar, [('k.png', picture(0)), ('k.txt', b'x'), ('k.txt', b'y')])
    with pytest.raises(DataFileError, match='a.tar holds k.txt twice'):
        sources.open_source([str(tar)])


def pack(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, raw in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def test_tars_are_read_in_their_order(tmp_path):
    image = picture(0)
    one = pack(tmp_path / '0.tar', {
        'b/2.png': image, 'b/2.txt': b'second', 'b/1.json': b'{"caption": "first", "x": 1}',
        'b/1.png': image, 'b/1.cls': b'7', 'notes': b''})
    two = pack(tmp_path / '1.tar', {'k.jpg': image, 'k.txt': b'third'})
    found = sources.open_source([str(one), str(two)])
    assert [(e.name, e.caption()) for e in found] == [
        ('0.tar/b/2', 'second'), ('0.tar/b/1', 'first'), ('1.tar/k', 'third')]
    assert found[2].read() == image
    assert found.listing != sources.open_source([str(one)]).listing


def test_a_tar_that_ends_early_is_not_read_as_a_shorter_one(tmp_path):
    """Cut off between two members, or with a damaged header, it would be without a word."""
    names = [f'{i}.{kind}' for i in range(3) for kind in ('png', 'txt')]
    whole = pack(tmp_path / 'a.tar', {name: picture(0) for name in names}).read_bytes()
    with tarfile.open(tmp_path / 'a.tar') as tar:
        headers = [member.offset for member in tar.getmembers()]
    damaged = [whole[:at] for at in headers[2:]] + [whole[:headers[4] + 100]] + [
        whole[:at] + b'\xff' * 512 + whole[at + 512:] for at in headers[2:]]
    for raw in damaged:
        (tmp_path / 'b.tar').write_bytes(raw)
        with pytest.raises(DataFileError, match='b.tar is no whole tar .its members end at byte'):
            sources.open_source([str(tmp_path / 'b.tar')])


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    images = fill(tmp_path / 'in', 2)
    other = fill(tmp_path / 'other', 1)
    (images / 'below').mkdir()
    (images / 'below' / 'loop').symlink_to(images)
    (images / 'here').symlink_to('.')
    (images / 'other').symlink_to(other)
    found = sources.open_source([str(images)])
    assert [entry.name for entry in found] == ['0.png', '1.png', 'other/0.png']


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    """Its images would be missing without a word."""
    images = fill(tmp_path / 'in', 2)
    (images / 'closed').mkdir()
    scandir = os.scandir

    def refused(number):
        def scan(folder):
            if os.path.basename(folder) == 'closed':
                raise OSError(number, os.strerror(number), folder)
            return scandir(folder)

        monkeypatch.setattr(os, 'scandir', scan)
        with pytest.raises(UserError, match='closed') as e:
            sources.open_source([str(images)])
        return str(e.value)

    assert 'permission is denied' in refused(errno.EACCES)
    assert 'cannot be listed' in refused(errno.ENOENT)


def test_a_table_of_other_names_says_how_images_are_called(tmp_path):
    images = fill(tmp_path / 'in', 1, captions=False)
    captions = table(tmp_path / 't.jsonl', file_name=[str(images / '0.png')], caption=['a'])
    with pytest.raises(DataFileError, match='names none of them, such as 0.png$'):
        sources.open_source([str(images)], captions)


def test_a_tfds_data_set_is_read(tmp_path):
    from ddmd_jax.families.emoji.drawings import DRAWINGS

    fields = sources.Fields(caption='object', image='drawing')
    found = sources.open_source([f'tfds:{DRAWINGS}'], fields=fields)
    assert len(found) > 100 and found[0].caption() and pixels.decode(found[3].read()).mode == 'RGB'
    with pytest.raises(DataFileError, match="no field 'caption'; there are drawing, object, set"):
        sources.open_source([f'tfds:{DRAWINGS}'], fields=sources.Fields(image='drawing'))


def test_home_is_filled_in_and_what_is_elsewhere_is_one_line(tmp_path, monkeypatch):
    images = fill(tmp_path / 'in', 2, captions=False)
    (images / 't.csv').write_text('file_name,caption\n0.png,a\n1.png,b\n')
    monkeypatch.setenv('HOME', str(tmp_path))
    found = sources.open_source(['~/in'], '$HOME/in/t.csv')
    assert [entry.caption() for entry in found] == ['a', 'b']
    assert found[1].read() == (images / '1.png').read_bytes()
    for given, captions in (('gs://bucket/in', ''), ('tfds:gs://bucket/in', ''),
                            ('~/in', 's3://bucket/t.csv')):
        with pytest.raises(PlaceError, match='must be a local path, not a (gs|s3):// URL'):
            sources.open_source([given], captions)


def no_captions(folder):
    return fill(folder / 'in', 3, captions=False), 'holds 3 images without captions; put'


def no_images(folder):
    return folder, 'holds no images'


def nothing(folder):
    return folder / 'nowhere', 'is not there; known are a folder'


def no_kind(folder):
    (folder / 'a.zip').touch()
    return folder / 'a.zip', "is of unknown kind '.zip'"


def no_tar(folder):
    (folder / 'a.tar').write_bytes(b'\x1f\x8b' + bytes(600))
    return folder / 'a.tar', 'is no whole tar'


def bare_tar(folder):
    return pack(folder / 'a.tar', {'k.png': picture(0)}), 'holds 1 images without captions; pack'


def no_data_set(folder):
    return f'tfds:{folder}/nothing', 'cannot be read'


@pytest.mark.parametrize('make', [no_captions, no_images, nothing, no_kind, no_tar, bare_tar,
                                  no_data_set])
def test_what_is_no_source_is_one_line(tmp_path, make):
    given, words = make(tmp_path)
    with pytest.raises(DataFileError, match=words) as e:
        sources.open_source([str(given)])
    assert len(str(e.value).splitlines()) == 1


# --- Codecs ---


@pytest.mark.parametrize('unet, index, words', [
    ({'addition_embed_type': None, 'cross_attention_dim': 768},
     {'_class_name': 'StableDiffusionPipeline'}, 'is Stable Diffusion 1 or 2'),
    ({}, {'_class_name': 'StableDiffusionXLImg2ImgPipeline', 'requires_aesthetics_score': True},
     "is the UNet of SDXL's refiner"),
    ({'in_channels': 9}, {'_class_name': 'StableDiffusionXLPipeline'}, 'is an inpainting UNet'),
    ({}, {'_class_name': 'StableDiffusionXLPipeline'}, 'has no vae, which makes latents')])
def test_another_pipelines_codec_is_refused(tmp_path, mesh, unet, index, words):
    folder = written(tmp_path, unet, index)
    with pytest.raises(WeightsError, match=words):
        families.get('sdxl').load_images(LoadOptions(str(folder), mesh))


def test_a_codecs_identity_is_its_encoders(tmp_path, pipeline, encoder):
    of = lambda folder: published_vae.encoder_identity(
        diffusers.open_folder(folder, published_vae.AUTOENCODER))
    assert of(pipeline / 'vae') == encoder.identity
    assert encoder.identity.endswith(' x 0.13025 from 0')
    write_vae(tmp_path / 'vae', seed=1)
    assert of(tmp_path / 'vae') != encoder.identity
    with pytest.raises(WeightsError, match='emoji has no codec that makes latents'):
        families.get('emoji').load_images(LoadOptions())


@pytest.mark.parametrize('name', ['latents_mean', 'latents_std'])
def test_a_codec_with_moments_of_each_channel_is_refused(name):
    """Pipelines scale by these beside the factor; ours would not."""
    assert published_vae.vae_config(VAE | {name: None}, 'float32')
    with pytest.raises(WeightsError, match=f'{name} is .0.5, 0.1.* supported is None'):
        published_vae.vae_config(VAE | {name: [0.5, 0.1, 0.2, 0.3]}, 'float32')


def test_a_codec_may_come_in_a_variant(tmp_path, pipeline, encoder, mesh):
    folder = shutil.copytree(pipeline, tmp_path / 'pipe')
    stem = folder / 'vae' / diffusers.STEM
    stem.with_suffix('.safetensors').rename(stem.with_suffix('.fp16.safetensors'))
    of = lambda variant: families.get('sdxl').load_images(
        LoadOptions(str(folder), mesh, variant=variant)).identity
    assert of('fp16') == encoder.identity
    with pytest.raises(WeightsError, match='name the variant'):
        of('')
    with pytest.raises(WeightsError, match='weights of emoji have no variants'):
        families.get('emoji').load_images(LoadOptions(variant='fp16'))


# --- A run ---


def teacher_of(codec, shape=(8, 8, 4)):
    latents = Latents(shape, shape_of=lambda size: (size[0] // 2, size[1] // 2, 4), encoder=codec)
    return Teacher('sdxl', None, None, latents, CondSpec.text(8), StepTable(), 'x', ())


def run_config(path, sizes=SIZES):
    config = load('sdxl:dmd2').unlock()
    with config.ignore_type():
        config.data.path, config.data.sizes = str(path), sizes
    return config


def test_a_run_refuses_latents_of_another_codec_or_size(tmp_path, encoder, mesh):
    encode(fill(tmp_path / 'in', 3), encoder, mesh, tmp_path / 'out')
    for codec, sizes, words in (
            ('another', SIZES, f'latents of another codec .{encoder.identity}. than the teacher'),
            (encoder.identity, SIZES[:1], r'of images of \(\(16, 16\), \(16, 24\)\) pixels'),
            (None, (), 'set config.data.sizes to these')):
        with pytest.raises(DataFileError, match=words) as e:
            prompts.of_images(run_config(tmp_path / 'out', sizes), teacher_of(codec), mesh)
        assert len(str(e.value).splitlines()) == 1


def test_damaged_latents_are_one_line(tmp_path, encoder, mesh):
    encode(fill(tmp_path / 'in', 3), encoder, mesh, tmp_path / 'out')
    file = tmp_path / 'out' / 'images-00000.array_record'
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataFileError, match='latents damaged'):
        cache.ImageCache(tmp_path / 'out')
    (tmp_path / 'out' / 'card.json').write_text('{"format": "ddmd_jax embeddings 1"}')
    with pytest.raises(DataFileError, match='is no folder of latents'):
        cache.ImageCache(tmp_path / 'out')
    with pytest.raises(DataFileError, match='no folder of latents at .*prepare images'):
        cache.ImageCache(tmp_path / 'nowhere')


def test_the_command_says_what_it_wrote(tmp_path, pipeline, command, capfd):
    images = fill(tmp_path / 'in', 3, captions=False)
    captions = table(tmp_path / 't.jsonl', file_name=['0.png', '1.png', '2.png'],
                     caption=['a', 'b', 'c'], long=['aa', 'bb', 'cc'])

    def call(*more):
        code = command(f'--input={images}', f'--captions={captions}', '--teacher=sdxl',
                       f'--path={pipeline}', '--sizes=16x16,16x24', f'--out={tmp_path / "out"}',
                       *more)
        return (code, *capfd.readouterr())

    code, written, _ = call()
    assert code == 0
    assert 'out written: 3 images (2 of 16x16, 1 of 16x24), 0 left out; identity' in written
    assert call()[:2] == (0, written.replace('written', 'is done already'))
    for more, words in (('--field=long', 'made otherwise (field: caption -> long); choose another'),
                        ('--sizes=16x17', '--sizes 16x17: both must be multiples of 2')):
        said = str(call(more)[0])
        assert words in said and len(said.splitlines()) == 1
    assert call('--sizes=16')[0] == 2
