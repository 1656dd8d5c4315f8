"""One paper model a file, with its frozen configuration."""
