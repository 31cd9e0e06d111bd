"""Attacks on what the server sees, each over recordings and public weights alone."""
