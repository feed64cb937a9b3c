"""Training by several workers: communication, shared data, and sharded state."""
