"""Ground floor: threads, deadlines, buffers, secrets, HTTP connections.  Knows no backup."""
