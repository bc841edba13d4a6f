"""Guest images: how they are made, found and checked."""
