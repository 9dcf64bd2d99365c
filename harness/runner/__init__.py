"""A run: what is asked, how it becomes requests, in which order they go, and what is recorded."""
