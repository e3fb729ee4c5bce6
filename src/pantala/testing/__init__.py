"""Fakes, builders and bounded polls; imported by tests only."""
