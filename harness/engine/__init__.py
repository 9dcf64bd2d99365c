"""The forward pass, what it runs on, and the interface of a method. It knows no method by name."""
