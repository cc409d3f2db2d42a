"""One module for each resource (docs/add-a-resource.md)."""
