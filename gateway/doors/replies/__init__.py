"""A model's reply, taken apart, for the APIs that show its parts."""
