"""What paired samples can say, and what they cannot."""
