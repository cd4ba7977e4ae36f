"""Trains the small specialist networks that ship with fourmill, on scenes."""
