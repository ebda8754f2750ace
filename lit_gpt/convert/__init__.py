"""Models in the formats of other programs: Hugging Face, GGUF and a web page."""
