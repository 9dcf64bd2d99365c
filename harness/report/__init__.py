"""Tables and plots of recorded runs. Everything here reads what `harness.storage.store` wrote and needs no model."""
