"""What several tasks share: texts, haystacks, named means. No task is in here."""
