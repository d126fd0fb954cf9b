"""What rapfast is compared with, written here because it cannot be installed."""
