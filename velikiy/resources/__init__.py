"""The resources: one module for each, and the rooms that all of them share (docs/add-a-resource.md)."""
