"""OCI references, registries, and images as root file systems; bases made from Debian packages."""
