"""From a name to a model with weights: checkpoints, GGUF files, the embedded model, random weights."""
