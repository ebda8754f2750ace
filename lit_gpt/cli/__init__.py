"""The commands of scripts/: one module per command, and what they share: arguments, parser, validation, messages."""
