"""A prompt's normal form, its id, and the split it belongs to."""

import hashlib
import re
import unicodedata

# Control characters, halves of surrogate pairs (JSON escapes can hold one) and the byte order
# mark. Joiners of zero width stay: emoji and several scripts are spelled with them.
_CONTROL = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff]')


def normalise(text: str) -> str:
    """`text` in Unicode NFC, on one line, with single spaces and none at its ends."""
    return ' '.join(unicodedata.normalize('NFC', _CONTROL.sub(' ', text)).split())


def digest(prompt: str) -> bytes:
    """sha256 of a normalised prompt in UTF-8; the id and the split are parts of it."""
    return hashlib.sha256(prompt.encode()).digest()


def in_validation(digest: bytes, share: float) -> bool:
    """Whether a prompt is of the validation split: a matter of its own words alone.

    Stable when prompts are added; a larger `share` adds prompts and moves none back. Independent
    of the digest's first bytes, by which prompts are ordered.
    """
    return int.from_bytes(digest[8:16], 'big') < share * 2**64
