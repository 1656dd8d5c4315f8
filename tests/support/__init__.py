"""Helpers that the tests share: contracts, oracles, tiny models."""
