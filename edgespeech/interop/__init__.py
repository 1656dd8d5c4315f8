"""Models on disk: our own folders, other projects' weights, exported programs."""
