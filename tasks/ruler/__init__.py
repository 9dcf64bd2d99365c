"""RULER (NVIDIA, v1): thirteen tasks on generated prompts of exact length."""
