"""What scorers are held to: pictures, prompts, tiny networks and weights, the same on both sides.

``python tests/score_reference.py`` writes ``golden/scores.json`` with the references themselves:
open_clip_torch 3.3.0, hpsv2 1.2.0, clean-fid 0.1.35, torch-fidelity 0.4.0, image-reward 1.5,
scikit-learn, prdc, ftfy, torch and torchvision. Tests need none of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / 'golden' / 'scores.json'
# Height and width of pictures: portrait, landscape, square, a pixel off, three off, upscaled.
SIZES = ((300, 200), (200, 301), (256, 256), (224, 225), (227, 224), (225, 226), (224, 224),
         (100, 64), (31, 77), (302, 299), (640, 480))
PROMPTS = (
    'a red apple', '', "  A   Photo, of\ta CAT's  hat!! It'll do... ", 'café naïve résumé',
    'cafe\u0301 combining', '“curly” ‘quotes’ — dash …', 'schÃ¶n mojibake â€™s',
    '&lt;b&gt;bold&lt;/b&gt; &amp;amp; &quot;x&quot; &#39;s', '日本語の猫 한국어 العربية',
    '😀 emoji 👨\u200d👩\u200d👧 🇫🇷', '1234567890 3.14 x2 ½ Ⅷ ٣', 'word ' * 100,
    'supercalifragilisticexpialidocious' * 8, 'ＦＵＬＬ width ﬁ ligature', 'ΣΣ ΟΔΟΣ İstanbul ẞ',
    'a\u00a0b\u2003c\u200bd\x1ce\x85f', "don't DON'T we'RE 'ſ 'S", '\\n\n\n newline',
    'a-b_c/d@e#f$%^&*()+=[]{}|;:<>?`~', 'x' * 400, ' '.join(['one two'] * 37), 'b ' * 72 + 'end')
ARCHITECTURES = {  # open_clip's name -> ours
    'ViT-L-14-quickgelu': 'ViT-L-14-quickgelu', 'ViT-L-14-336-quickgelu': 'ViT-L-14-336-quickgelu',
    'ViT-L-14': 'ViT-L-14', 'ViT-H-14': 'ViT-H-14', 'ViT-g-14': 'ViT-g-14',
    'ViT-bigG-14': 'ViT-bigG-14'}
# A tiny CLIP whose proportions are g/14's.
TEXT = {'context_length': 77, 'vocab_size': 200, 'width': 24, 'heads': 3, 'layers': 2}
VISION = {'image_size': 28, 'layers': 2, 'width': 32, 'head_width': 8, 'patch_size': 14,
          'mlp_ratio': 4.3637}
EMBED = 16
# ImageReward's two networks, tiny: fields of transformers' BertConfig, and of its own ViT.
BERT = {'vocab_size': 60, 'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
        'num_attention_heads': 3, 'max_position_embeddings': 50, 'layer_norm_eps': 1e-12,
        'hidden_act': 'gelu', 'pad_token_id': 0, 'add_cross_attention': True, 'encoder_width': 32}
VIT = {'img_size': 32, 'patch_size': 16, 'embed_dim': 32, 'depth': 2, 'num_heads': 4}
SMALL = 107  # side of pictures for Inception: all of its layers, a ninth of the work


def picture(size: tuple[int, int]) -> np.ndarray:
    """Noise over a slope, ``[H, W, 3] uint8``."""
    random = np.random.default_rng(size)
    slope = np.linspace(0, 127, size[1])[None, :, None] + np.linspace(0, 64, size[0])[:, None, None]
    return (slope + random.integers(0, 65, (*size, 3))).astype(np.uint8)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights by published names, of a size at which every layer matters."""
    found = {}
    for name, shape in shapes.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        x = random.standard_normal(shape)
        if name.endswith('running_var'):
            x = 0.5 + random.random(shape)
        elif name == 'logit_scale':
            x = np.full(shape, 3.0)
        elif len(shape) > 1 and 'embedding' not in name.rsplit('.', 2)[-2:][0]:
            x = x * (1.4 / np.sqrt(np.prod(shape[1:])))
        elif 'norm' in name.lower() or 'ln_' in name or '.bn.' in name:
            x = (1 if name.endswith('weight') else 0) + 0.1 * x
        else:
            x = 0.3 * x
        found[name] = x.astype(np.float32)
    return found


def clip_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[3, 28, 28, 3]`` and ids ``[3, 77]`` with their end tokens at different places."""
    random = np.random.default_rng(0)
    ids = random.integers(1, 190, (3, 77))
    for row, end in zip(ids, (5, 40, 76)):
        row[end:] = 0
        row[end] = 199
    return random.standard_normal((3, 28, 28, 3)).astype(np.float32), ids


def reward_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels ``[3, 32, 32, 3]``, ids and mask ``[3, 35]`` of prompts of different lengths."""
    random = np.random.default_rng(4)
    mask = np.arange(35) < np.asarray([[35], [9], [2]])
    ids = np.where(mask, random.integers(1, 60, (3, 35)), 0)
    return random.standard_normal((3, 32, 32, 3)).astype(np.float32), ids, mask


def features() -> tuple[np.ndarray, np.ndarray]:
    """Two sets that overlap, ``[300, 8]`` and ``[260, 8]``."""
    random = np.random.default_rng(1)
    mix = random.standard_normal((8, 8))
    return (random.standard_normal((300, 8)) @ mix,
            random.standard_normal((260, 8)) @ (mix + 0.2) + 0.5)


def digest(x: np.ndarray) -> str:
    """Of an array's shape, type and bytes."""
    x = np.ascontiguousarray(x)
    return hashlib.sha256(f'{x.shape}{x.dtype}'.encode() + x.tobytes()).hexdigest()[:16]


def sampled(x: np.ndarray) -> list[float]:
    """Some thirty values all over an array, to eight digits."""
    return [float(f'{v:.8g}') for v in x.ravel()[::max(1, x.size // 31)]]


def names(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of names and shapes."""
    return hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16]


def folded(shapes: dict[str, tuple[int, ...]]) -> dict[str, list]:
    """Names with ``{}`` for the layer -> (how many layers, shape)."""
    found: dict[str, list] = {}
    for name, shape in shapes.items():
        alike = not name.startswith('mlp.')  # the head's layers are not of one shape
        key = '.'.join('{}' if alike and part.isdigit() else part for part in name.split('.'))
        found[key] = [found.get(key, [0])[0] + 1, list(shape)]
    return found


# --- The references ---


def _without_operators() -> None:
    """torchvision without its compiled operators, if its wheel is not of this torch's build."""
    import importlib.util
    import re

    import torch

    root = Path(importlib.util.find_spec('torchvision').origin).parent
    text = (root / '_meta_registrations.py').read_text()
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in {*re.findall(r'"torchvision::(\w+)"', text),
                 *re.findall(r'register_meta\("(\w+)"\)', text)}:
        library.define(f'{name}(Tensor x) -> Tensor')
    globals()['_library'] = library  # which lasts as long as it is held


def _pixels() -> dict[str, dict[str, object]]:
    import torch
    import torchvision
    from cleanfid.resize import build_resizer
    from open_clip.transform import image_transform
    from PIL import Image, __version__ as pillow
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as tensorflow,
    )
    from torchvision.transforms import functional

    package = types.ModuleType('hps_open_clip')  # without its __init__, which wants more packages
    spec = importlib_spec('hpsv2')
    package.__path__ = [str(Path(spec) / 'src' / 'open_clip')]
    sys.modules['hps_open_clip'] = package
    from hps_open_clip.transform import image_transform as hps_transform

    clip, hps = image_transform(224, False), hps_transform(224, False, resize_longest_max=True)
    clean = build_resizer('clean')
    last = lambda x: x.numpy().transpose(1, 2, 0)
    middle = lambda image: functional.center_crop(image, min(image.size))
    lanczos = lambda image, size: image.resize((size, size), Image.LANCZOS)

    def patch(image: Image.Image) -> np.ndarray:
        whole = min(image.size) < 299
        return clean(np.asarray(image if whole else functional.center_crop(image, 299)))

    def narrow(image: Image.Image) -> np.ndarray:
        """HPS's, with the filter that torchvision had until 0.16."""
        resize, kept = functional.resize, hps.transforms[2].forward.__globals__['F']
        old = types.SimpleNamespace(**vars(kept))
        old.resize = lambda x, size, how: resize(x, size, how, antialias=False)
        hps.transforms[2].forward.__globals__['F'] = old
        try:
            return last(hps(image))
        finally:
            hps.transforms[2].forward.__globals__['F'] = kept

    exact = {
        'clip': lambda image: last(clip(image)),
        'clip_dmd2': lambda image: last(clip(lanczos(middle(image), 256))),
        'inception_tensorflow': lambda image: last(tensorflow(
            torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float(), (299, 299),
            align_corners=False)[0]),
    }
    assert tuple(map(int, torchvision.__version__.split('.')[:2])) >= (0, 17)
    images = {size: Image.fromarray(picture(size)) for size in SIZES}
    name = lambda size: 'x'.join(map(str, size))
    found = {key: {name(size): digest(make(image)) for size, image in images.items()}
             for key, make in exact.items()}
    # Of floats Pillow and torch sum in an order of their version's own.
    floats = {'inception_clean': lambda image: clean(np.asarray(image)),
              'inception_dmd2': lambda image: clean(np.asarray(lanczos(middle(image), 512))),
              'inception_patch': patch}
    found['pillow'] = pillow
    for key, make in floats.items():
        found[key] = {name(size): {'digest': digest(make(image)), 'sampled': sampled(make(image))}
                      for size, image in images.items()}
    for key, make in {'hps': lambda image: last(hps(image)), 'hps_narrow': narrow}.items():
        found[key] = {name(size): sampled(make(image)) for size, image in images.items()
                      if max(size) != 224}
    return found


def importlib_spec(package: str) -> str:
    """The folder of a package, which is not imported."""
    import importlib.util

    return str(Path(importlib.util.find_spec(package).origin).parent)


def _clips() -> dict[str, object]:
    import open_clip
    import torch
    from open_clip.model import CLIP

    pixels, ids = clip_inputs()
    found: dict[str, object] = {}
    for quick in (True, False):
        model = CLIP(EMBED, VISION, TEXT, quick_gelu=quick).eval()
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        model.load_state_dict({k: torch.tensor(x) for k, x in weights(shapes).items()})
        with torch.no_grad():
            image = model.encode_image(torch.tensor(pixels).permute(0, 3, 1, 2), normalize=True)
            text = model.encode_text(torch.tensor(ids), normalize=True)
        found['quick_gelu' if quick else 'gelu'] = {
            'image': sampled(image.numpy()), 'text': sampled(text.numpy())}
    found['tiny'] = folded(shapes)
    for name in ARCHITECTURES:
        with torch.device('meta'):
            model = open_clip.create_model(name, pretrained=None, device='meta')
        found[name] = folded({k: tuple(x.shape) for k, x in model.state_dict().items()})
    return found


def _inception() -> dict[str, object]:
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as reference

    class Small(reference.FeatureExtractorInceptionV3):
        INPUT_IMAGE_SIZE = SMALL

        def load_state_dict(self, state: object, *args: object) -> None:
            del state, args
            shapes = {name: tuple(x.shape) for name, x in self.state_dict().items()
                      if not name.endswith('num_batches_tracked')}
            super().load_state_dict(
                {k: torch.tensor(x) for k, x in weights(shapes).items()}, strict=False)

    reference.load_state_dict_from_url = lambda *args, **kwargs: None
    model = Small('small', ['2048'])
    image = torch.tensor(picture((SMALL, SMALL))).permute(2, 0, 1)[None]
    return {'names': names({k: tuple(x.shape) for k, x in model.state_dict().items()
                            if not k.endswith('num_batches_tracked')}),
            'features': sampled(model(image)[0].numpy())}


def _reward() -> dict[str, object]:
    import torch
    import transformers
    from transformers import modeling_utils, pytorch_utils

    # It was written for transformers 4.2x, and imports by the package's __init__ what it needs not.
    for name in ('apply_chunking_to_forward', 'find_pruneable_heads_and_indices',
                 'prune_linear_layer'):
        setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
    root = importlib_spec('ImageReward')
    for part in ('', '/models', '/models/BLIP'):
        package = types.ModuleType('ImageReward' + part.replace('/', '.'))
        package.__path__ = [root + part]
        sys.modules[package.__name__] = package
    from ImageReward import ImageReward as reference
    from ImageReward.models.BLIP import blip_pretrain, med, vit

    med.BertPreTrainedModel.init_weights = lambda self: None
    med.BertModel.get_head_mask = lambda self, mask, layers: [None] * layers
    med.BertModel.invert_attention_mask = lambda self, mask: (
        1 - mask[:, None, None, :].float()) * -10000
    blip_pretrain.init_tokenizer = lambda: None
    blip_pretrain.create_vit = lambda *args: (vit.VisionTransformer(**VIT), VIT['embed_dim'])
    blip_pretrain.BertConfig = types.SimpleNamespace(
        from_json_file=lambda path: transformers.BertConfig(**BERT))
    head = reference.MLP
    reference.MLP = lambda width: head(BERT['hidden_size'])
    model = reference.ImageReward('').eval()
    shapes = {k: tuple(x.shape) for k, x in model.state_dict().items()
              if not k.endswith('position_ids')}
    model.load_state_dict({k: torch.tensor(x) for k, x in weights(shapes).items()}, strict=False)
    pixels, ids, mask = (torch.tensor(x) for x in reward_inputs())
    with torch.no_grad():
        reward = model.score_gard(ids, mask.long(), pixels.permute(0, 3, 1, 2))
    reference.MLP = head
    blip_pretrain.create_vit = lambda *args: (vit.VisionTransformer(
        img_size=224, embed_dim=1024, depth=24, num_heads=16), 1024)
    blip_pretrain.BertConfig = types.SimpleNamespace(
        from_json_file=lambda path: transformers.BertConfig(
            vocab_size=30524, add_cross_attention=True))  # med_config.json; the rest is BERT-base
    ramp = torch.linspace
    torch.linspace = lambda *args: ramp(*args, device='cpu')  # of which the ViT asks for values
    with torch.device('meta'):
        full = reference.ImageReward('').state_dict()
    return {'shapes': folded(shapes), 'reward': reward[:, 0].tolist(),
            'full': folded({k: tuple(x.shape) for k, x in full.items()})}


def _distances() -> dict[str, object]:
    import prdc
    import torch
    from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    real, drawn = features()
    x, y = torch.tensor(drawn), torch.tensor(real)
    fid = metric_fid.fid_statistics_to_metric(
        *map(metric_fid.fid_features_to_statistics, (x, y)), False)
    kid = metric_kid.kid_features_to_metric(
        x, y, kid_subsets=10, kid_subset_size=50, verbose=False, rng_seed=2020, kid_kernel='poly',
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    prc = metric_prc.prc_features_to_metric(
        x, y, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    a, b = unit(real), unit(drawn)
    k = lambda p, q: rbf_kernel(p, q, gamma=1 / 200).mean()
    n, m = len(real), len(drawn)
    poly = lambda p, q: polynomial_kernel(p, q, degree=3, coef0=1)
    whole = ((poly(real[:m], real[:m]).sum() - np.trace(poly(real[:m], real[:m]))) / (m * (m - 1))
             + (poly(drawn, drawn).sum() - np.trace(poly(drawn, drawn))) / (m * (m - 1))
             - 2 * poly(real[:m], drawn).mean())
    assert n > m
    return {**fid, **kid, **{k: float(v) for k, v in prc.items()},
            'cmmd': float(1000 * (k(a, a) + k(b, b) - 2 * k(a, b))), 'kid_all': float(whole),
            'prdc': {k: float(v) for k, v in prdc.compute_prdc(real, drawn, 5).items()}}


def main() -> None:
    """Writes the file."""
    _without_operators()
    import open_clip

    ids = open_clip.get_tokenizer('ViT-H-14')(list(PROMPTS)).numpy()
    golden = {'pixels': _pixels(), 'clip': _clips(), 'inception': _inception(),
              'distances': _distances(), 'reward': _reward(),
              'ids': [row[:int(np.argmax(row)) + 1].tolist() for row in ids]}
    GOLDEN.write_text(json.dumps(golden, separators=(',', ':')).replace('},"', '},\n"') + '\n')


if __name__ == '__main__':
    main()
