"""Training: state, step, loop, checkpoints, sharding. Imports nothing by itself."""
