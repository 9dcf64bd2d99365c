"""Generated suites, at any length and without downloads."""
