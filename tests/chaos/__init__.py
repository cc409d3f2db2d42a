"""`./run chaos`: one party misbehaves, and the others must not notice. docs/reliability.md explains it."""
