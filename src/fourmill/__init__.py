"""fourmill: a pseudo-labeling data engine and training pipeline for any-to-any masked models."""

__version__ = "0.1.0"
