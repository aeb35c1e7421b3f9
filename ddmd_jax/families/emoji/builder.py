"""TFDS builder of the emoji glyphs: ArrayRecord on disk, no TensorFlow to write or read."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ddmd_jax.families.emoji.data import SIZE


class EmojiGlyphs(tfds.core.GeneratorBasedBuilder):
    """Noto Color Emoji glyphs, ``[24, 24, 4]`` uint8 RGBA, with their Unicode names."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}

    def __init__(self, *, names: list[str], glyphs: np.ndarray, **kwargs):
        self._rows = list(zip(names, glyphs, strict=True))
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({
            'name': tfds.features.Text(),
            'glyph': tfds.features.Tensor(
                shape=(SIZE, SIZE, 4), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB),
        })
        return tfds.core.DatasetInfo(
            builder=self, features=features, license='SIL Open Font License 1.1',
            homepage='https://github.com/googlefonts/noto-emoji',
            description='Glyphs of Noto Color Emoji at 24 x 24 pixels with their names.')

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i, (name, glyph) in enumerate(self._rows):
            yield i, {'name': name, 'glyph': glyph}


def write(names: list[str], glyphs: np.ndarray, out: Path) -> None:
    """Builds the data set in a scratch folder and, once it is whole, puts it in place of `out`."""
    with tempfile.TemporaryDirectory() as scratch:
        builder = EmojiGlyphs(names=names, glyphs=glyphs, data_dir=scratch)
        # Insertion order is the order of a fixed hash of the keys: the same on every machine.
        tfds.disable_progress_bar()
        builder.download_and_prepare()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(builder.data_dir, out)
