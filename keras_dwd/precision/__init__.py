"""Precision matrices Λ: linear algebra that does not depend on a Keras model."""
