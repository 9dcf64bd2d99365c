"""What the recorded decode steps of some methods need, apart from the algorithm."""
