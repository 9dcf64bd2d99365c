"""`harness reproduce sliminfer`: the paper's table beside this machine's."""
