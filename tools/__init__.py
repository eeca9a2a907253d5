"""What maintains the repository: none of it is installed."""
