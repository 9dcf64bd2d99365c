"""What several methods share: scores, schedules, stores. No method is in here."""
