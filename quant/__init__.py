"""Float bundle -> smaller bundle, and what that cost."""
