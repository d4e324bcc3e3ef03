"""Geometry-grounded vision-language models as a library."""
