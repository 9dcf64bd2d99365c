"""Published claims of the field as data, and what recorded runs say of each."""
