"""Measure speed beside other projects; nothing imports it."""
