"""Decode steps that are recorded once and replayed: what they find on the device, and how they are cut."""
