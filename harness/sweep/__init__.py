"""`harness sweep`: a grid of method options x tasks x lengths x models, as runs; nothing here has side effects."""
