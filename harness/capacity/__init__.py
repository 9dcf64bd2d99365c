"""How many requests a device holds at once under each method, and how fast it decodes them."""
