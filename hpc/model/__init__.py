"""The model, cut into client head, trunk and client tail."""
