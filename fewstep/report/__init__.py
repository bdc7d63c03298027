"""What a run leaves to look at: log, charts, grids, health, report. Nothing here imports torch."""
