"""LongBench v1 and LongBench-E: data, prompts, scorers and means as published."""
