"""The live PyTorch engine: the one part of tidesim that imports torch."""
