"""What several files of the suite need."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path, request):
    """A folder on a disk of 12 MiB, room for three checkpoints, or of as many as are asked for."""
    size = f'size={getattr(request, "param", 12)}m'
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', size, 'tmpfs', str(tmp_path)],
                          capture_output=True, check=False)
    if done.returncode:
        pytest.skip('a disk cannot be mounted here')
    yield tmp_path
    subprocess.run(['umount', '--lazy', str(tmp_path)], check=True)
