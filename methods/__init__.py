"""Pruning methods, one file each; `harness/engine/method.py` is the interface and full attention at once."""
