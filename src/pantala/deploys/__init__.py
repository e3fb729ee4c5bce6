"""A deploy, planned and executed over the public API."""
