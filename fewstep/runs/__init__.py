"""One recipe from start to end."""
