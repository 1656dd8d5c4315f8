"""Jobs on a SLURM cluster: see `python -m launch.slurm --help`."""
