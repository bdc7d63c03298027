"""EDM's networks, their pipeline and their published files."""
