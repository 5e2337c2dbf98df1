"""From tokenized pairs to packed rows and global batches."""
