"""What Keras users do with a model works with a `DWDModel`, fresh and after a boundary."""

import pytest
from conformance import HABITS, check


@pytest.mark.parametrize("habit", HABITS)
def test_what_users_do(habit):
    check(HABITS[habit])
