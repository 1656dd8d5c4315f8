"""Jobs on Google Kubernetes Engine: see `python -m launch.gke --help`."""
