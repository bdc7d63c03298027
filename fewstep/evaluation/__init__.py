"""Measuring images: features, statistics, distances, and the command `fewstep eval`.

`images` reads, `extractors` turns images into features, `statistics` keeps their moments, `metrics` is the
mathematics (functions of tensors), `evaluate` puts them together. Nothing is imported here, so that `fewstep
--help` stays fast.
"""
