"""What the operator of a key service types. Each module holds the commands of one subject."""
