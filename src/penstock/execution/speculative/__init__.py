"""Proposers of draft tokens, and what is measured of them."""
