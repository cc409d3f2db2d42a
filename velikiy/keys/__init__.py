"""API keys: the right of a client to read, or to read and write.

tokens      the text of a key that its owner keeps: its form, its checksum, its digest
store       the table `api_keys`: create, list, revoke and rotate keys; a key as a cached path

A key is a path, `/.keys/<digest>`: edges keep what it allows in their memory, and revoking it is a write that passes
the gate. So a revoked key is refused everywhere once `revoke` has returned.
"""
