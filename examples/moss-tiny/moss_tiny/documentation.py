"""Search over the product's own documentation, with the local index that users have."""
