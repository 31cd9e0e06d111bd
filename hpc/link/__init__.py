"""Sealed, ordered, two-ended channels between a client and its trunk rank.

From the bottom: `frame` (tensor ↔ bytes), `cipher`, `transport` with `gloo`, `nccl` and `mpi`, `channel`;
`identity` and `handshake` give a channel its keys, `connect` joins them; `peers` seals between clients.
"""
