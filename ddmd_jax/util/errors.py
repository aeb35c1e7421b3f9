"""The errors that a command puts in one line, and those that are the machine's fault."""

import errno
import os
import re
from collections.abc import Iterator

from ddmd_jax.util.text import first_line


class UserError(Exception):
    """Its message is one line: what is wrong, where, and how to mend it."""


class EnvironmentFault(UserError):
    """The machine is at fault (a disk, a permission, memory, a device, a network), not a file's
    content: nothing was shown to be bad, and the same command may work later."""


# By number, and by what libraries write that pass no number on (Rust's, TensorStore's, gRPC's).
_FULL = 'there is no room on the disk; make some, then run the same command again'
_DENIED = 'permission is denied; see to the permissions, then run the same command again'
_BUSY = 'too many files are open; raise `ulimit -n`, then run the same command again'
_DISK = 'the disk or its network does not answer as it should; see to it, then run the same command'
_MEMORY = 'there is not enough memory; see `python -m ddmd_jax.plan` for what needs less'
_NETWORK = 'the network does not answer; see to it, then run the same command again'
_BUCKET = ('a bucket cannot be read or written; see to its name, the network and your access, then '
           'run the same command again')
_DEVICE = ('JAX cannot use the devices that it is told to (JAX_PLATFORMS={platforms}); set '
           'JAX_PLATFORMS=cpu, or see to the driver and to the jax that is installed')
_NUMBERS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _DENIED),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _BUSY),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO), _DISK),
    errno.ENOMEM: _MEMORY,
    **dict.fromkeys((errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED,
                     errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT), _NETWORK)}
_WORDS = (
    (r'os error 28\b|no space left|disk quota exceeded', _FULL),
    (r'os error (13|30)\b|permission denied|PERMISSION_DENIED|read-only file system|'
     r'^Forbidden: ', _DENIED),  # the last is gcsfs's
    (r'os error 24\b|too many open files', _BUSY),
    (r'os error 5\b|input/output error|stale file handle', _DISK),
    (r'unable to initialize backend|unknown backend|no visible (tpu|gpu)', _DEVICE),
    (r'RESOURCE_EXHAUSTED|out of memory|cannot allocate memory', _MEMORY),
    (r'name resolution|network is unreachable|connection (refused|reset|aborted)|timed out',
     _NETWORK))
# Modules of what reads buckets, whose errors have no common ancestor.
_STORES = re.compile(r'(gcsfs|s3fs|(aio)?botocore|aiohttp|google\.(api_core|auth|cloud))\b')
_SUBJECT = re.compile(r"'([^']*/[^']*)'|\"([^\"]*/[^\"]*)\"")


def environment(error: BaseException, subject: object = '') -> EnvironmentFault | None:
    """The fault of the machine that `error`, or an error that led to it, comes from; else None.

    `subject` is what was read or written, for errors that name no file.
    """
    for one in _chain(error):
        if isinstance(one, EnvironmentFault):
            return one
        if isinstance(one, UserError):
            continue  # its words are ours, and quote whatever they speak of
        cure = _cure(one)
        if cure:
            where = getattr(one, 'filename', None) or next(
                (a or b for a, b in _SUBJECT.findall(str(one))), subject)
            words = cure.format(platforms=os.environ.get('JAX_PLATFORMS', ''))
            reason = first_line(one)[:200]
            return EnvironmentFault(f'{where}: {words} ({reason})' if where else
                                    f'{words} ({reason})')
    return None


def no_devices(reason: str) -> EnvironmentFault:
    """What is said where JAX has no devices, and says so in words of its own."""
    words = _DEVICE.format(platforms=os.environ.get('JAX_PLATFORMS', ''))
    return EnvironmentFault(f'{words} ({reason})')


def raise_environment(error: BaseException, subject: object = '') -> None:
    """Raises what `environment` finds; what is left is the fault of what was read or asked for."""
    if fault := environment(error, subject):
        raise fault from error


def _cure(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return _MEMORY
    store = any(_STORES.match(kind.__module__) for kind in type(error).__mro__)
    if isinstance(error, OSError) and error.errno is not None:
        return _NUMBERS.get(error.errno, _BUCKET if store else '')
    if isinstance(error, ConnectionError | TimeoutError):
        return _NETWORK
    if isinstance(error, PermissionError):  # s3fs gives it no number
        return _DENIED
    if store:
        return _BUCKET
    return next((cure for words, cure in _WORDS if re.search(words, str(error), re.I)), '')


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and those that led to it, nearest first."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.append(one)
        yield one
        waiting += [e for e in (one.__cause__, one.__context__) if e is not None]
        waiting += getattr(one, 'exceptions', ())
