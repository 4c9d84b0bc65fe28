"""The subcommands of `stip`, one module each."""
