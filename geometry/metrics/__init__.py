"""Benchmark metrics of depth, point maps, normals and cameras: float64 on the host, deterministic, no gradients."""
