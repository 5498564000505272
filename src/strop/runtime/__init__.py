"""The programs that run a file that was exported, in this process: so far llama.cpp for GGUF."""
