"""From source to an OCI image in the registry: scanners, build contexts, BuildKit."""
