"""Figures of results and of what a model retains, made with matplotlib.

They need the extra `plots`: `pip install "keras_dwd[plots]"`. Each function returns a
`matplotlib.figure.Figure`, to be shown by a notebook or saved by `figure.savefig("name.svg")`.

Example:

```python
from keras_dwd import plots

plots.accuracy_over_time("results.json").savefig("over_time.svg")
plots.groups(model).savefig("groups.svg")
```
"""

from keras_dwd.plots.of_models import groups, layer_importance, layers_by_groups, task_graph
from keras_dwd.plots.of_results import (
    accuracy_matrix,
    accuracy_over_time,
    method_comparison,
    strength_curve,
)

__all__ = [
    "accuracy_matrix",
    "accuracy_over_time",
    "groups",
    "layer_importance",
    "layers_by_groups",
    "method_comparison",
    "strength_curve",
    "task_graph",
]
