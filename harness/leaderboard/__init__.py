"""`harness leaderboard`: methods of several runs side by side, where they may be; nothing here has side effects."""
