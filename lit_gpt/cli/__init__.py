"""The commands in scripts/: arguments, validation, messages."""
