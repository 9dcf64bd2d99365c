"""What is on the disk: records, runs, and the hashes that say whether an answer may be used again."""
