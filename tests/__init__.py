"""Makes this a package: some libraries install a top-level ``tests``, which would hide it."""
