"""What a client does to what it sends, and how it watches what comes back."""
