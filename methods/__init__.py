"""Pruning methods, one file each; `methods/base.py` is the interface and full attention at once."""
