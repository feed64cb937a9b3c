"""What Keras users do with a model works with a `DWDModel`, fresh and after a boundary."""

import pytest
from conformance import HABITS, check_after, check_fresh


@pytest.mark.parametrize("habit", HABITS)
def test_what_users_do(habit):
    check_after(HABITS[habit], *check_fresh(HABITS[habit]))
