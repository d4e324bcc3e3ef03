"""Pure geometry: tensors in, tensors out. Imports nothing of the project."""
