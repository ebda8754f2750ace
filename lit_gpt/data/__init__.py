"""Files -> documents -> token ids -> windows -> batches."""
