"""Trained weights from outside and to outside: the released npz layout, timm's, and this project's own."""
