"""Many runs of one program with other flags: see `python -m launch.sweep --help`."""
