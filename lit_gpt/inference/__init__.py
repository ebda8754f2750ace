"""From a model and a prompt to new text; works without a Trainer."""
