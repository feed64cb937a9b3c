"""The task graph: similarities of tasks and the penalty that follows from them."""
