"""`harness reproduce`: published claims, measured again. One file a set of claims; nothing here has side effects."""
