"""Measure the speed of this project next to other projects; nothing else imports this package."""
