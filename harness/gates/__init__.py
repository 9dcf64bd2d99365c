"""`harness baseline` and `harness check`: regression gates for CI."""
