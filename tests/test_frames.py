"""The way from the command to the network stays short enough to be read."""

import pytest
import tiny


@pytest.mark.slow
def test_from_main_to_the_critics_network_are_ten_frames_at_most():
    """`benchmarks/frames.py` ends with 1 if there are more."""
    told = tiny.run_on_devices(tiny.ROOT / 'benchmarks' / 'frames.py', 1)
    assert 'method/algorithm.py' in told and 'critic_objective' in told
