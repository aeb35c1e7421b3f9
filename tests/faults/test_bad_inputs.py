"""The table of bad inputs in docs/bad_inputs.md is what processes say that are given them."""

import bad_inputs
import pytest


@pytest.mark.slow
@pytest.mark.faults
def test_the_table_in_the_docs_is_what_happens():
    found = bad_inputs.outcomes()
    for case, (code, told) in zip(bad_inputs.CASES, found, strict=True):
        assert code in (1, 2, 3) and told, f'{case.what}: {code} {told}'
        assert 'Traceback' not in told and 'EXECUTED' not in told, f'{case.what}: {told}'
        assert ' / ' not in told, f'{case.what} takes more than one line: {told}'
    assert bad_inputs.table(found) == bad_inputs.in_docs(), (
        'docs/bad_inputs.md has another table; run python tests/faults/bad_inputs.py')


def test_there_are_as_many_as_were_asked_for():
    assert len({case.what for case in bad_inputs.CASES}) == len(bad_inputs.CASES) >= 25
