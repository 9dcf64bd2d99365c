"""What a recorded run would take on a device that is not at hand."""
