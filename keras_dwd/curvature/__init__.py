"""Estimates of the Fisher information, from which the precision is built."""
