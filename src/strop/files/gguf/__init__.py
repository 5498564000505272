"""GGUF, the file of llama.cpp: types and blocks of weights, the reader, and what a file of a model needs besides."""
