"""Tables and plots of recorded runs. Everything here reads what `harness.store` wrote and needs no model."""
