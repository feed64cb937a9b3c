"""Training on a task: the training step, data checks, and the pass over data at the boundary."""
