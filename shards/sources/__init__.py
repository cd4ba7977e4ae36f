"""Sources: one file per kind of image-caption collection."""
