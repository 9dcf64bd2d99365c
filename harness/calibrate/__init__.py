"""Trains the gates of methods that need a file of them; weights stay as they are."""
