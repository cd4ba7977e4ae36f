"""The training room: order, masking, the any-to-any model and its trainer."""
