"""Flax NNX modules, one mechanism a file."""
