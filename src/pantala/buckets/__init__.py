"""The operator's S3-compatible store, as far as a deploy's files need it."""
