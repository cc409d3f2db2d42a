"""Many rows at once, of every resource: `velikiy users import FILE`, `export FILE`, `seed --count N`."""
