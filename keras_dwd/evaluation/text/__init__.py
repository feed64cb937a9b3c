"""Sequences of text tasks, a small model that writes text, and metrics of what it writes."""
