"""What the server, a peer or a colluding client can learn of private text, and what is done against it."""
