"""Models and tokenizers out of `.gguf` files."""
