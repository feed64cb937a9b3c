"""Layers that models for several tasks need."""
