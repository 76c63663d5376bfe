"""Sample delivery: which sample is seen when (`order`), where its bytes are (`source`), what becomes of them."""
