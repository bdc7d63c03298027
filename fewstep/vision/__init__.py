"""Networks that look at images: extractors, scores, distances, rewards."""
