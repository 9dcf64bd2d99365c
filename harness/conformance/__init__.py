"""The conformance kit: a method judged from outside on tiny models."""
