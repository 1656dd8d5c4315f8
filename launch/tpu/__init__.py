"""Jobs on a TPU VM pod slice: see `python -m launch.tpu --help`."""
