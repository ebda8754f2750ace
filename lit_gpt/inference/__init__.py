"""Generate text with a model; nothing here needs a Trainer."""
