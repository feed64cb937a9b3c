"""Training a sequence of tasks and measuring what is retained."""
