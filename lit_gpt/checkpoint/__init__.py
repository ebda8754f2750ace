"""Checkpoints: written atomically, verified, and read without running code from them."""
