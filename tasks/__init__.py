"""Tasks: what is asked and how an answer is scored; `tasks/base.py` is the interface."""
