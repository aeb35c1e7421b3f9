"""Every objective and schedule gives the figures it gave before the code was written anew."""

import json

import numpy as np
import pytest
from reference import CASES, GOLDEN, case_figures, in_double

WANTED = json.loads(GOLDEN.read_text())
FAST = ('coupled_shared, dmd2', 'decoupled_hybrid, shift 3')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_losses_gradients_and_states_are_as_before(name):
    """Metrics of two updates of each network, then norm and projections of every tree."""
    with in_double():
        found, wanted = case_figures(CASES[name]), WANTED[name]
    assert found.keys() == wanted.keys()
    for part, figures in wanted.items():
        if isinstance(figures, dict):
            assert found[part].keys() == figures.keys()
            got, want = ([d[k] for k in figures] for d in (found[part], figures))
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8, err_msg=part)
        else:  # the mean square of random projections of a difference is its squared norm
            length, *projections = np.subtract(found[part], figures)
            distance = np.sqrt(np.mean(np.square(projections)))
            assert max(abs(length), distance) <= 2e-7 * figures[0], part
