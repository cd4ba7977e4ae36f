"""The labeler room: specialist networks that turn images into pseudo labels."""
