"""Each claim of the README as a command."""
