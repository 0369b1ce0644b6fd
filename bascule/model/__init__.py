"""The decoder: tensors in, tensors out; it never asks which chip. Folders in Hugging Face layout in and out."""
