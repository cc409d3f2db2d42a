"""Many rows at once, for every resource: import from a file, export to a file, and seed. No HTTP is involved."""
