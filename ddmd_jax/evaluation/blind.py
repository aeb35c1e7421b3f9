"""The blind page: people rank two or three models without knowing which is which.

One static file with all pictures in it. Order of prompts and sides is drawn anew in every
browser; choices stay there, are exported as JSON, and exports of several people are tallied
together as in the paper's appendix C: shares of ranks, and pairwise wins with intervals.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from ddmd_jax.evaluation import sheets
from ddmd_jax.evaluation.results import Evaluated, ResultsError, check_alike, titles
from ddmd_jax.util import files

SIDE = 768  # pixels of a picture's longer side in the page
SMALL = 128  # below, pictures are kept to the bit and enlarged without a filter
_TEMPLATES = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                loader=jinja2.FileSystemLoader(Path(__file__).parent))


def write(path: Path, rows: Sequence[Evaluated], prompts: int | None = None,
          seed: int = 0) -> Path:
    """Writes the page of two or three rows, of `prompts` prompts (None: all); returns `path`.

    Raises:
      ResultsError: other prompts or seeds, or one row twice.
      ImagesError: images are missing.
    """
    check_alike(rows)
    if len({(one.folder.resolve(), one.row) for one in rows}) < len(rows):
        raise ResultsError('one evaluation is named twice; a blind page compares different ones')
    total = len(dict.fromkeys(zip(rows[0].groups, (name.prompt for name in rows[0].named))))
    shown = sheets.chosen(rows[0], prompts or total)
    images = [one.images() for one in rows]
    items = [{'prompt': rows[0].named[i].prompt, 'number': rows[0].named[i].number,
              'pictures': [data_url(found.read(i)) for found in images]} for i in shown]
    data = {'models': titles(rows), 'items': items, 'seed': seed}
    data['page'] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    # No '<' stands in the script: a prompt may have what ends one, or begins a comment there.
    text = _TEMPLATES.get_template('blind.html.jinja').render(
        count=len(rows), data=Markup(json.dumps(data).replace('<', '\\u003c')))
    files.write(path, text)
    return path


def data_url(image: np.ndarray) -> str:
    """``[H, W, 3] uint8`` as a WebP that stands in a page."""
    out, picture = io.BytesIO(), Image.fromarray(image)
    small = max(picture.size) <= SMALL
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.save(out, 'WEBP', lossless=small, quality=92)
    return 'data:image/webp;base64,' + base64.b64encode(out.getvalue()).decode()
