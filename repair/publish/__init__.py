"""A repaired model becomes a folder, or a repository on the Hub."""
