"""Sequences of tasks and the data sets they are made from."""
