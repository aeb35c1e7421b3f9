"""A suite with its prompts, as an evaluation asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddmd_jax.diffusion import drawing
from ddmd_jax.diffusion.drawing import ImageName
from ddmd_jax.evaluation.benchmarks import Prompt
from ddmd_jax.evaluation.suites import Examples, Suite


@dataclasses.dataclass(frozen=True)
class Asked:
    """A suite and the images that are to be there of it.

    Attributes:
      suite: a family's own has `examples`, a published one `prompts`.
      named: the images, by prompt and noise.
      groups: of each image, '' where a suite has none.
    """

    suite: Suite
    named: Sequence[ImageName]
    groups: Sequence[str]
    examples: Examples | None = None
    prompts: Sequence[Prompt] = ()

    def about(self) -> dict[str, Any]:
        return {'images': len(self.named), 'names': drawing.digest(self.named)}


def own(suite: Suite, seen: int, held_out: int, seed: int) -> Asked:
    """A family's own suite, with so many captions of its world."""
    assert suite.examples is not None
    examples = suite.examples(seen, held_out, seed)
    return Asked(suite, drawing.names(examples.captions, 1, seed), [''] * len(examples.captions),
                 examples)


def published(suite: Suite, files: Path, limit: int | None, seed: int) -> Asked:
    """A published suite, its prompts read from `files`; of every group the first `limit`.

    Raises:
      DataFileError: `files` are not that suite's.
    """
    found, seen = [], dict[str, int]()
    for prompt in suite.prompts(files):
        seen[prompt.group] = seen.get(prompt.group, 0) + 1
        if not limit or seen[prompt.group] <= limit:
            found.append(prompt)
    return Asked(suite, drawing.names([prompt.text for prompt in found], suite.images, seed),
                 [prompt.group for prompt in found for _ in range(suite.images)], None, found)
