"""`harness study`: methods at matched budgets over tasks, lengths and protocols; nothing here has side effects."""
