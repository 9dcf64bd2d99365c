"""InfiniteBench: ten of its twelve tasks, from the files of its data set."""
