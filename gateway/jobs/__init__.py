"""Durable jobs: many requests from one file, whose results are kept until they are fetched."""
