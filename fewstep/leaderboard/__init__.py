"""Many recipes under one budget: trained, measured alike, and shown on one page; see :mod:`.board`."""
