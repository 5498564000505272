"""GGUF, the file of llama.cpp: its types and blocks, its names of tensors and settings, its vocabularies."""
