"""What several files of the suite need."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 32 MiB, room for four of the toy's checkpoints."""
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', str(tmp_path)],
                          capture_output=True, check=False)
    if done.returncode:
        pytest.skip('a disk cannot be mounted here')
    yield tmp_path
    subprocess.run(['umount', '--lazy', str(tmp_path)], check=True)
