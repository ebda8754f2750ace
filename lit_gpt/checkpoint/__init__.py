"""Checkpoints: written atomically, verified, opened without running code."""
