"""Students and teachers: one configurable Linen decoder, its families, and Hugging Face files in and out."""
