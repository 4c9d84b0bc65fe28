"""The command lines of protection."""
