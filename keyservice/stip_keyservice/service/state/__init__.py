"""What the key service remembers: the tables, and the database they are in."""
