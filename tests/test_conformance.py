"""What Keras users do with a model works with a `DWDModel`, fresh and after a boundary."""

import pytest
from cases import sweep
from conformance import HABITS, check_after, check_fresh

# Other tests have much of this by itself.
CORE = [
    "dict inputs and outputs, `loss_weights`",
    "`PyDataset`",
    "optimizer Lion",
]


@pytest.mark.parametrize("habit", sweep(HABITS, *CORE))
def test_what_users_do(habit):
    check_after(HABITS[habit], *check_fresh(HABITS[habit]))
