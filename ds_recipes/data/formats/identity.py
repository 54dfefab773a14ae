"""What a format's fingerprint is made of."""

import xxhash


def fingerprint_of(*parts: str | bytes) -> str:
    """xxh3-128 over the parts and their lengths, so that no two lists of parts run together: 32 hex digits."""
    digest = xxhash.xxh3_128()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return str(digest.hexdigest())
