"""What every long-running part does the same way: configuration, logs, metrics, gRPC serving, shutdown."""
