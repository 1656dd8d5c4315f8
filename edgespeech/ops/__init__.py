"""Pure functions on arrays: no parameters, no Flax, no input or output."""
