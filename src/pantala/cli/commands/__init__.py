"""One module a noun; imported when its command runs."""
