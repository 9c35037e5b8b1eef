"""Videos and images: files to pixels and back."""
