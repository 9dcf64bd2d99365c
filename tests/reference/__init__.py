"""Slow twins of the pruning methods, written from the papers' formulas; they share no code with `methods`."""
