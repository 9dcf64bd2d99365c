"""Where orders are carried out: processes of this machine, or of a Ray cluster."""
