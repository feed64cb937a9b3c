"""Several workers: what they tell each other, and who keeps what."""
