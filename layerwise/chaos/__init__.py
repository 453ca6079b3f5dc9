"""Chaos runs: a job under planned faults, and a report of what it made of them."""
